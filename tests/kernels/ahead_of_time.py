"""Compiles kernels for a GPU that is not there, down to machine code: what the interpreter cannot tell."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver


class _AbsentGPU:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(capability: int = 90) -> Iterator[list[CompiledKernel]]:
    """Every launch within, on CPU tensors, compiles its kernel for these arguments and runs nothing.

    Yields the list that the kernels go to. Needs a process of its own without TRITON_INTERPRET: Triton picks the
    interpreter when a kernel's module is imported.
    """
    kernels: list[CompiledKernel] = []
    launch = JITFunction.run

    def compile_only(function: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(launch(function, *args, grid=grid, warmup=True, **options))

    before = driver._active
    driver.set_active(_AbsentGPU(capability))
    try:
        with mock.patch.object(JITFunction, "run", compile_only):
            yield kernels
    finally:
        driver._active = before
