"""Which of some engines moves rows best: found out by all ranks at once, and the same for all.

A step takes as long as its slowest rank, and ranks share host memory and its bus: a rank that measured alone, or chose
for itself, could choose one that the others' load makes the slower.
"""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from offload.device.streams import Event, Streams
from offload.transfers.engine import Transfers

T = TypeVar("T", bound=Transfers)

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


class Products:
    """Large matrix products, which take all of a GPU's processors as a model does.

    Args:
        streams: of the device.
        device: to compute on.
        size: of the square matrices.
        count: of the products.
    """

    def __init__(self, streams: Streams, device: torch.device, size: int = 4096, count: int = 32) -> None:
        # At the 700 TFLOP/s of an H100 they take 6 ms, and the rows of a sample about as long to travel both ways.
        self._streams, self._stream, self._count = streams, streams.new(), count
        self._factor, self._product = (torch.zeros(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
        self._factor.normal_()
        self._stream.wait_event(streams.current().record_event())

    def __call__(self) -> Event:
        """Begins; the mark is behind the last of them."""
        with self._streams.use(self._stream):
            for _ in range(self._count):
                torch.mm(self._factor, self._factor, out=self._product)
        return self._stream.record_event()


def fastest(
    engines: Sequence[T],
    num_rows: int,
    window_CW: Tensor,
    ranks: Ranks,
    beside: Callable[[], Event] | None = None,
) -> tuple[T, list[float]]:
    """Times rows on their way from host memory into slots that are still free, and back again. Collective.

    They travel whole, as rows that were updated do, and host memory keeps what it holds.

    Args:
        engines: the same ones on every rank.
        num_rows: of this rank's shard.
        window_CW: this rank's window.
        ranks: all of them.
        beside: begins what is computed meanwhile, and counts as much as the rows: what ends last ends the time.

    Returns:
        That whose slowest rank is the fastest, the same on every rank; and each one's seconds for a GB each way.
    """
    count = min(num_rows, len(window_CW), _SAMPLE_ROWS)
    slots = torch.arange(count)
    rows = slots * (num_rows // max(1, count))
    gb = max(1, count) * window_CW.stride(0) * window_CW.element_size() / 1e9
    seconds = [_round_trip_s(engine, rows, slots, ranks, beside) / gb for engine in engines]
    return engines[min(range(len(engines)), key=seconds.__getitem__)], seconds


def _round_trip_s(
    engine: Transfers, rows: Tensor, slots: Tensor, ranks: Ranks, beside: Callable[[], Event] | None
) -> float:
    """Of the slowest rank, the shortest of a few, after one that may have to compile."""
    times = []
    for _ in range(1 + _SAMPLES):
        ranks.any(False)  # nobody is measured while another still compiles
        started = time.perf_counter()
        computed = beside() if beside else None
        engine.fetch(rows, slots, len(rows)).wait()
        engine.write_back(slots, rows).wait()
        if computed is not None:
            computed.synchronize()
        times.append(time.perf_counter() - started)
    return ranks.largest(min(times[1:]))
