"""Counts what code gives a GPU to do, without one.

CPU tensors say that they are a GPU's, so that every choice of an implementation is a GPU's. Counted are the operations
that PyTorch dispatches, also those within the project's own operations, and every kernel that Triton is told to launch.
Views and new memory are no operations. Triton's kernels do not run: what they would have written is what was in memory.

An operation need not be one kernel: a sort is several; an RMSNorm is six operations on a CPU and one kernel on a GPU.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@contextmanager
def on_a_gpu() -> Iterator[Counter[str]]:
    """What is launched within, by name, where CPU tensors pass for a GPU's; kernels are named `triton::...`."""
    counted: Counter[str] = Counter()

    def launch(kernel: Any, *_arguments: object, **_options: object) -> None:
        counted[f"triton::{kernel.fn.__name__}"] += 1

    with (
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(InterpretedFunction, "run", launch),
        mock.patch.object(JITFunction, "run", launch),
        _Dispatched(counted),
    ):
        yield counted


class _Dispatched(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(
        self, operation: Any, _types: object, arguments: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        name, options = operation._schema.name, options or {}
        if name.startswith("engram::"):
            with self, torch.no_grad():
                return OPDEFS[name]._init_fn(*arguments, **options)
        result = self._run(operation, arguments, options)
        if isinstance(result, Tensor | tuple | list) and not _only_memory(operation):
            self._counted[name] += 1
        return result

    def _run(self, operation: Any, arguments: Any, options: dict[str, Any]) -> Any:
        if operation is torch.ops.aten.mm.dtype:  # bf16 to fp32, which only a GPU has
            return torch.mm(*(argument.float() for argument in arguments[:2]))
        return operation(*arguments, **options)


def _only_memory(operation: Any) -> bool:
    name = operation._schema.name
    return operation.is_view or "empty" in name or name in ("aten::_unsafe_view", "aten::lift_fresh")
