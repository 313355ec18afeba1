"""Locks host memory in place and maps it for the GPU, so that kernels and copy engines reach it over the bus.

Memory is registered in place, never copied, in chunks: by several threads at a time, since the system locks page after
page, and because a single registration of 512 GiB or more fails on current drivers. The driver's API is called, not the
runtime's: a call of the runtime that fails leaves its error behind, for some later kernel launch to report as its own.
"""

import ctypes
import mmap
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.errors import Unavailable
from offload.host.limits import locking_limits, size_text

CHUNK_BYTES = 4 << 30
"""Bytes of one registration: a whole number of pages of any size."""

_TELL_EVERY_S = 10.0
_PORTABLE, _DEVICE_MAP = 1, 2  # CU_MEMHOSTREGISTER_*, cuda.h
_SUCCESS = 0
# CUresult, cuda.h
_HINTS = {
    1: "the memory is of a kind that cannot be locked, such as a file's",
    2: "the machine leaves too little memory that can be locked",
    304: "the system does not let this process lock so much memory",
    712: "a part of it is registered already",
    801: "this system's driver does not support it, as under WSL",
}
_HINTS[999] = _HINTS[304]
_MAY_BE_THE_LIMIT = (2, 304, 999)
_STAGED = "set offload.engine=staged, which needs no locked tables"


class PinError(Unavailable):
    """Host memory cannot be registered with the GPU."""


class Driver(Protocol):
    """What is asked of the GPU's driver, by any thread. Every call returns the driver's return code first; 0 is
    success."""

    def register(self, address: int, nbytes: int) -> int:
        """Locks memory and maps it for all GPUs."""

    def unregister(self, address: int) -> int:
        """Undoes the registration that began at `address`."""

    def device_pointer(self, address: int) -> tuple[int, int]:
        """The address at which the GPU finds registered memory."""

    def name(self, code: int) -> str:
        """The driver's name of a return code."""


class CudaDriver:
    """The driver of the machine's NVIDIA GPUs.

    Args:
        device: whose context is used.

    Raises:
        PinError: there is no driver to call.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)  # the calls below need a context, which is made when it is first used
        try:
            self._library: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise PinError(f"the GPU's driver cannot be loaded ({error}): {_STAGED}") from None
        self._context = ctypes.c_void_p()
        with torch.cuda.device(device):
            self._library.cuCtxGetCurrent(ctypes.byref(self._context))

    def register(self, address: int, nbytes: int) -> int:
        """See `Driver.register`."""
        flags = ctypes.c_uint(_PORTABLE | _DEVICE_MAP)
        with self._in_context():
            return self._library.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)

    def unregister(self, address: int) -> int:
        """See `Driver.unregister`."""
        with self._in_context():
            return self._library.cuMemHostUnregister(ctypes.c_void_p(address))

    def device_pointer(self, address: int) -> tuple[int, int]:
        """See `Driver.device_pointer`."""
        pointer = ctypes.c_uint64(0)
        arguments = ctypes.byref(pointer), ctypes.c_void_p(address), ctypes.c_uint(0)
        with self._in_context():
            code = self._library.cuMemHostGetDevicePointer_v2(*arguments)
        return code, pointer.value

    @contextmanager
    def _in_context(self) -> Iterator[None]:
        # A thread begins without a context, and torch's own guard leaves a thread that is on this GPU by default as is.
        self._library.cuCtxPushCurrent_v2(self._context)
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def name(self, code: int) -> str:
        """See `Driver.name`."""
        text = ctypes.c_char_p()
        if self._library.cuGetErrorName(ctypes.c_int(code), ctypes.byref(text)) != _SUCCESS or not text.value:
            return f"CUDA error {code}"
        return text.value.decode()


class PinnedMemory:
    """A registration of host memory, from construction until `close`.

    Args:
        words_N: contiguous host memory starting at a page boundary, held for as long as it is registered. All of it
            should have been touched; otherwise the driver touches it, on one core.
        driver: of the GPU.
        chunk_bytes: of one registration: whole pages.
        threads: how many register chunks at a time.
        tell: is told now and then how far it is.

    Raises:
        PinError: the driver refuses; what it had registered before is undone.
        ValueError: memory or chunks begin within a page.
    """

    pointer: int
    """Where the GPU finds the memory, as one contiguous piece."""

    def __init__(
        self,
        words_N: Tensor,
        driver: Driver,
        chunk_bytes: int = CHUNK_BYTES,
        *,
        threads: int = 1,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        # Whole pages are registered: of two chunks that share a page, one would be registered already.
        if words_N.data_ptr() % mmap.PAGESIZE or chunk_bytes % mmap.PAGESIZE:
            raise ValueError(f"memory at {words_N.data_ptr():#x} in chunks of {chunk_bytes} bytes is not whole pages")
        self._words_N, self._driver = words_N, driver
        self._registered: list[int] = []
        # Memory that is unmapped while it is registered is never given back to the system.
        self._close = weakref.finalize(self, _unregister, driver, self._registered, words_N)
        self._close.atexit = False  # the driver may be gone by then, and the memory goes with the process
        try:
            self.pointer = self._register(chunk_bytes, threads, tell)
        except BaseException:
            self._close()
            raise

    def view(self, device: torch.device) -> Tensor:
        """A tensor on the GPU that is this memory, not a copy of it. It must not be used after `close`.

        Raises:
            PinError: torch gives a copy, or a tensor of another device.
        """
        words_N = self._words_N
        view_N = torch.as_tensor(_CudaArray(words_N, self.pointer), device=device)
        if view_N.data_ptr() != self.pointer or view_N.device != device or len(view_N) != len(words_N):
            raise PinError(
                f"the GPU's view of the tables is at {view_N.data_ptr():#x} on {view_N.device}, but the memory is at "
                f"{self.pointer:#x} for {device}: {_STAGED}"
            )
        return view_N

    def close(self) -> None:
        """Unregisters the memory, once. Nothing on the GPU may be using it.

        Raises:
            PinError: the driver refuses.
        """
        self._close()

    def _register(self, chunk_bytes: int, threads: int, tell: Callable[[str], None]) -> int:
        start, size = self._words_N.data_ptr(), self._words_N.nbytes
        spans = [(start + at, min(chunk_bytes, size - at)) for at in range(0, size, chunk_bytes)]
        bases, told, done = set(), time.monotonic(), 0
        refused: list[BaseException] = []

        def register(span: tuple[int, int]) -> int:
            try:
                if refused:  # all of it is going to be undone
                    return 0
                return self._register_chunk(*span)
            except BaseException as error:
                refused.append(error)
                raise

        with ThreadPoolExecutor(threads, "engram-pin") as pool:
            for pointer, (address, nbytes) in zip(pool.map(register, spans), spans, strict=True):
                bases.add(pointer - (address - start))
                done += nbytes
                if time.monotonic() - told >= _TELL_EVERY_S:
                    told = time.monotonic()
                    tell(f"locking host memory for the GPU: {size_text(done)} of {self._size}")
        if len(bases) > 1:
            raise PinError(f"the GPU does not see {self._size} of host memory as one piece: {_STAGED}")
        return bases.pop()

    def _register_chunk(self, address: int, nbytes: int) -> int:
        """Returns where the GPU finds the chunk."""
        self._require(self._driver.register(address, nbytes), f"registering {size_text(nbytes)} of {self._size}")
        self._registered.append(address)
        code, pointer = self._driver.device_pointer(address)
        self._require(code, f"mapping {self._size}")
        return pointer

    @property
    def _size(self) -> str:
        return size_text(self._words_N.nbytes)

    def _require(self, code: int, what: str) -> None:
        if code != _SUCCESS:
            reasons = [_HINTS[code]] if code in _HINTS else []
            reasons += locking_limits() if code in _MAY_BE_THE_LIMIT else []
            what = f"{what} of host memory for the GPU failed with {self._driver.name(code)}"
            raise PinError(f"{what}: {'; or '.join([*reasons, _STAGED])}")


class _CudaArray:
    """Announces memory to torch as a GPU's; torch keeps this object, and with it the memory."""

    def __init__(self, words_N: Tensor, pointer: int) -> None:
        self._words_N = words_N
        self.__cuda_array_interface__ = {
            "shape": (len(words_N),),
            "typestr": "<f4",
            "data": (pointer, False),
            "strides": None,
            "version": 3,
        }


def _unregister(driver: Driver, registered: list[int], words_N: Tensor) -> None:
    """Undoes every registration, whatever became of those before it; `words_N` is held until then."""
    codes = []
    while registered:
        codes.append(driver.unregister(registered.pop()))
    for code in codes:
        if code != _SUCCESS:
            raise PinError(f"unregistering {size_text(words_N.nbytes)} of host memory failed with {driver.name(code)}")
