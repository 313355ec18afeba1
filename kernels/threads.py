"""Work on rows, shared among as many threads as torch would use."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

_FEW_ROWS = 256  # not worth a second thread


def split_rows(num_rows: int, work: Callable[[int, int], None]) -> None:
    """Calls `work(start, end)` for parts of the rows in parallel; `work` must release the GIL.

    The number of parts is the calling thread's `torch.get_num_threads()`.
    """
    parts = max(1, min(torch.get_num_threads(), num_rows // _FEW_ROWS))
    bounds = [num_rows * part // parts for part in range(parts + 1)]
    others = [_pool(parts - 1).submit(work, *bounds[part : part + 2]) for part in range(1, parts)]
    work(*bounds[:2])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads), "engram-rows")
