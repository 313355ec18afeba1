"""Work on rows, shared among as many threads as torch would use."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import count

import torch

_FEW_ROWS = 256  # not worth a second thread
_PARTS = 8  # of a thread


def threads_for(num_rows: int) -> int:
    """How many threads are worth so many rows: at most the calling one's `torch.get_num_threads()`."""
    return max(1, min(torch.get_num_threads(), num_rows // _FEW_ROWS))


def each_thread(threads: int, work: Callable[[int], None]) -> None:
    """Calls `work(0)` to `work(threads - 1)` in parallel; `work` must release the GIL."""
    others = [_pool(threads - 1).submit(work, thread) for thread in range(1, threads)]
    work(0)
    for other in others:
        other.result()


def split_rows(num_rows: int, work: Callable[[int, int], None]) -> None:
    """Calls `work(start, end)` for parts of the rows in parallel; `work` must release the GIL.

    Threads take part after part, so that none waits for one that has to share its core.
    """
    threads = threads_for(num_rows)
    parts = 1 if threads == 1 else min(_PARTS * threads, num_rows // _FEW_ROWS)
    taken = count()  # by one thread at a time: it holds the GIL

    def take(thread: int) -> None:
        while (part := next(taken)) < parts:
            work(num_rows * part // parts, num_rows * (part + 1) // parts)

    each_thread(threads, take)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """What the calling thread gives to torch inside is done by itself alone, with the same bits on any number of cores.

    After an operation that torch shares, OpenMP's threads wait for the next one without giving up their cores, for
    milliseconds in which threads of ours want them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads), "engram-rows")
