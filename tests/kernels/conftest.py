"""Where a Triton kernel is tested: in the interpreter on CPU tensors, and on a GPU where there is one."""

import os
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def _patch_with_indices(tensor: type, scope: "interpreter._LangPatchScope") -> None:
    # The interpreter's scalars are arrays of one element, which NumPy since 2.4 no longer takes for numbers: without
    # this no loop could have a bound that is only known at run time.
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())


def _convert_as_a_gpu(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object) -> np.ndarray:
    # The interpreter cuts float32 off where a GPU rounds to the nearest bf16.
    if rounding is None and source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()
    return _convert_float(values, source, target, rounding)


def _dot_of_bf16(builder: interpreter.InterpreterBuilder, a: Any, b: Any, *rest: Any) -> Any:
    # The interpreter keeps bf16 as whole numbers, and multiplies those.
    if a.dtype.scalar == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle(_convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)
            for x in (a, b)
        )
    return _create_dot(builder, a, b, *rest)


interpreter._patch_lang_tensor = _patch_with_indices
interpreter._convert_float = _convert_as_a_gpu
interpreter.InterpreterBuilder.create_dot = _dot_of_bf16


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tensors to call a `kernels.*_triton` function with."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    return torch.device(request.param)
