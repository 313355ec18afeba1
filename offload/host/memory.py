"""Maps anonymous memory of exactly the requested size."""

import ctypes
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from offload.errors import Unavailable
from offload.host.limits import size_text

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, linux/mman.h; from Linux 5.14 on
_CHUNK = 64 << 20  # a whole number of huge pages on every architecture
_MAX_THREADS = 32


def map_anonymous(nbytes: int) -> mmap.mmap:
    """Private anonymous memory, all zero, that no forked child sees.

    Private, because huge pages of shared memory are switched off on most systems. Hidden from children, because a
    fork's copy-on-write would move pages away from under a GPU's transfers.

    Raises:
        Unavailable: the system refuses.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise Unavailable(f"the system refuses {size_text(nbytes)} of host memory ({error.strerror})") from None
    advise(memory, "MADV_DONTFORK")
    return memory


def advise(memory: mmap.mmap, name: str) -> bool:
    """Gives advice by madvise(2); False where the system does not take it."""
    try:
        memory.madvise(getattr(mmap, name))
    except (AttributeError, OSError):
        return False
    return True


def zeros_on(device: torch.device, num_rows: int, words: int) -> Tensor:
    """Zeroed records [rows, words] on a device: on a CPU in huge pages where the system gives them.

    Rows are used in any order, and each one in another small page costs the processor a page-table walk.

    Raises:
        Unavailable: there is no room for them.
    """
    nbytes = num_rows * words * 4
    if device.type != "cpu" or not nbytes:
        try:
            return torch.zeros(num_rows, words, device=device)
        except torch.OutOfMemoryError:
            raise Unavailable(
                f"{device} has no {size_text(nbytes)} left for the records of {num_rows:,} rows: lower "
                "offload.window_rows, or set offload.mode to window"
            ) from None
    memory = map_anonymous(nbytes)
    advise(memory, "MADV_HUGEPAGE")
    return torch.frombuffer(memory, dtype=torch.float32).view(num_rows, words)


def touch(words_N: Tensor, threads: int, madvise: Callable[..., int] | None = None) -> None:
    """Makes the system allocate all pages now, by several threads at a time.

    Args:
        words_N: fp32 [N], all zero, starting at a page boundary.
        threads: how many to use.
        madvise: the C library's, which is called without the GIL, unlike Python's.
    """
    advise_pages = madvise or ctypes.CDLL(None, use_errno=True).madvise

    def populate(chunk: Tensor) -> None:
        span = ctypes.c_void_p(chunk.data_ptr()), ctypes.c_size_t(chunk.numel() * 4)
        if advise_pages(*span, ctypes.c_int(_POPULATE_WRITE)) != 0:
            chunk[:: mmap.PAGESIZE // 4] = 0.0  # Linux before 5.14

    with ThreadPoolExecutor(max(1, min(threads, _MAX_THREADS))) as pool:
        list(pool.map(populate, words_N.split(_CHUNK // 4)))
