"""Compiles what Triton calls launch, in a process of its own: kernels defined in this one are the interpreter's.

All tests share that process, and what it has compiled: importing torch and Triton takes longer than most kernels.
"""

import atexit
import functools
import os
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tests.kernels.ahead_of_time import Resources

T = TypeVar("T")


def compile_launches(calls: Callable[[], object]) -> list[tuple[str, str]]:
    """Name and PTX of every kernel that `calls()`, a function of a module, launches with CPU tensors.

    Each is compiled to an H100's machine code and is not run.
    """
    return _in_own_process(_compile, calls)


def resources_of_launches(calls: Callable[[], object]) -> list[tuple[str, "Resources"]]:
    """Like `compile_launches`: the name of every kernel, and what it takes of a GPU's processor."""
    return _in_own_process(_weigh, calls)


def columns_side_by_side(calls: Callable[[], object]) -> list[tuple[str, set[str]]]:
    """Like `compile_launches`: the name of every kernel, and how many neighbours one thread has in its blocks."""
    return _in_own_process(_lay_out, calls)


def _in_own_process(work: Callable[[Callable[[], object]], list[T]], calls: Callable[[], object]) -> list[T]:
    try:
        return _process().submit(work, calls).result()
    except BrokenProcessPool:
        _process.cache_clear()
        raise


@functools.cache
def _process() -> ProcessPoolExecutor:
    cache = tempfile.TemporaryDirectory()
    atexit.register(cache.cleanup)
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_without_interpreter, initargs=(cache.name,))


def _without_interpreter(cache: str) -> None:
    os.environ.update(TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0")


def _compile(calls: Callable[[], object]) -> list[tuple[str, str]]:
    from tests.kernels.ahead_of_time import compiling

    with compiling() as kernels:
        calls()
    assert all(len(kernel.asm["cubin"]) > 0 for kernel in kernels)
    return [(kernel.metadata.name, kernel.asm["ptx"]) for kernel in kernels]


def _weigh(calls: Callable[[], object]) -> list[tuple[str, "Resources"]]:
    from tests.kernels.ahead_of_time import compiling, resources

    with compiling() as kernels:
        calls()
    return [(kernel.metadata.name, resources(kernel)) for kernel in kernels]


def _lay_out(calls: Callable[[], object]) -> list[tuple[str, set[str]]]:
    from tests.kernels.ahead_of_time import compiling

    with compiling() as kernels:
        calls()
    return [
        (kernel.metadata.name, set(re.findall(r"sizePerThread = \[(.*?)\]", kernel.asm["ttgir"]))) for kernel in kernels
    ]
