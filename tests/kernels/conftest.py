"""Where a Triton kernel is tested: in the interpreter on CPU tensors, and on a GPU where there is one."""

import os

import pytest
import torch
from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_with_indices(tensor: type, scope: "interpreter._LangPatchScope") -> None:
    # The interpreter's scalars are arrays of one element, which NumPy since 2.4 no longer takes for numbers: without
    # this no loop could have a bound that is only known at run time.
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_indices


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tensors to call a `kernels.*_triton` function with."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    return torch.device(request.param)
