"""Which of some engines is in the way least: found out by all ranks at once, and the same for all.

A step takes as long as its slowest rank, and ranks share host memory and its bus: a rank that measured alone, or chose
for itself, could choose one that the others' load makes the slower.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from offload.device.streams import Event
from offload.errors import Unavailable
from offload.transfers.engine import Transfers
from offload.transfers.trial import Trial

T = TypeVar("T", bound=Transfers)
M = TypeVar("M")

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

    def agreed(self, make: Callable[[], M], elsewhere: Unavailable) -> M:
        """What `make` returns, once it has on every rank. Collective.

        Args:
            make: may raise an error of the type of `elsewhere`.
            elsewhere: raised if only other ranks' did.
        """
        made, refused = None, None
        try:
            made = make()
        except type(elsewhere) as error:
            refused = error
        if self.any(refused is not None):
            raise refused or elsewhere
        assert made is not None
        return made

    def largest(self, number: float) -> float:
        """The largest of the ranks' numbers. Collective: no rank continues before all have arrived."""
        if self._world_size == 1:
            return number
        largest = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return float(largest)


def fastest(
    engines: Sequence[T], trial: Trial, ranks: Ranks, beside: Sequence[Callable[[], Event]]
) -> tuple[T, list[float]]:
    """Times a trial beside each of some loads. Collective.

    Args:
        engines: the same ones on every rank.
        trial: of this rank's rows.
        ranks: all of them.
        beside: each begins what is computed meanwhile, and counts as much as the rows: what ends last ends the time.

    Returns:
        That whose slowest rank is the fastest, the same on every rank; and each one's seconds for a GB each way, added
        up over the loads.
    """
    seconds = [sum(_seconds(engine, trial, ranks, load) for load in beside) / trial.gb for engine in engines]
    return engines[min(range(len(engines)), key=seconds.__getitem__)], seconds


def _seconds(engine: Transfers, trial: Trial, ranks: Ranks, beside: Callable[[], Event]) -> float:
    """Of the slowest rank, the shortest of a few, after one that may have to compile."""
    trial.warm_up(engine)
    times = []
    for _ in range(1 + _SAMPLES):
        ranks.any(False)  # nobody is measured while another still compiles
        times.append(trial.seconds(engine, beside))
    return ranks.largest(min(times[1:]))
