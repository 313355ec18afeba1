"""Compiles kernels for a GPU that is not there, down to machine code: what the interpreter cannot tell."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from triton import knobs
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


@dataclass(frozen=True)
class Resources:
    """What a kernel's machine code takes of a GPU's processor: 32-bit registers and bytes.

    Attributes:
        registers: of a thread.
        stack: of a thread, where registers are spilled to.
        local: of a thread, other memory of its own.
        shared: of a program.
        threads: of a program.
    """

    registers: int
    stack: int
    local: int
    shared: int
    threads: int


def resources(kernel: CompiledKernel) -> Resources:
    """Reads a kernel's needs from its machine code, with the tool that Triton carries."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code.cubin"
        code.write_bytes(kernel.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(code)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found is not None, said
    return Resources(
        int(found[1]), int(found[2]), int(found[3]), kernel.metadata.shared, 32 * kernel.metadata.num_warps
    )
