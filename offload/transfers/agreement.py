"""Chooses the faster engine: measured on all ranks at once, and the same for all.

A step takes as long as its slowest rank, and ranks share host memory and its bus: a rank that measured alone, or chose
for itself, could choose one that the others' load makes the slower.
"""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from offload.transfers.engine import Transfers

_SAMPLE_ROWS = 1 << 16
_SAMPLES = 3


class Ranks:
    """The ranks that have to agree.

    Args:
        world_size: how many there are.
        group: of them, with communication in host memory; None for all.
    """

    def __init__(self, world_size: int, group: dist.ProcessGroup | None) -> None:
        self._world_size, self._group = world_size, group

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank. Collective."""
        return bool(self.largest(float(here)))

    def largest(self, number: float) -> float:
        """The largest of the ranks' numbers. Collective: no rank continues before all have arrived."""
        if self._world_size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return float(largest)


def fastest(engines: Sequence[Transfers], num_rows: int, window_CW: Tensor, ranks: Ranks) -> tuple[Transfers, str]:
    """Times fetches from host memory into slots that are still free, on all ranks at once. Collective.

    Args:
        engines: the same ones on every rank.
        num_rows: of this rank's shard.
        window_CW: this rank's window.
        ranks: all of them.

    Returns:
        The engine whose slowest rank is the fastest, the same on every rank; and what was measured.
    """
    count = min(num_rows, len(window_CW), _SAMPLE_ROWS)
    slots = torch.arange(count)
    rows = slots * (num_rows // max(1, count))
    seconds = [_fetch_s(engine, rows, slots, ranks) for engine in engines]
    best = min(range(len(engines)), key=seconds.__getitem__)
    nbytes = count * window_CW.shape[1] * window_CW.element_size()
    rates = (f"{engine.name} {nbytes / 1e9 / s:.1f} GB/s" for engine, s in zip(engines, seconds, strict=True))
    return engines[best], ", ".join(rates)


def _fetch_s(engine: Transfers, rows: Tensor, slots: Tensor, ranks: Ranks) -> float:
    """Seconds of the shortest of a few fetches, after one that may have to compile, on the slowest rank."""
    engine.fetch(rows, slots, len(rows)).wait()
    ranks.any(False)  # nobody is measured while another still compiles
    times = []
    for _ in range(_SAMPLES):
        started = time.perf_counter()
        engine.fetch(rows, slots, len(rows)).wait()
        times.append(time.perf_counter() - started)
    return ranks.largest(min(times))
