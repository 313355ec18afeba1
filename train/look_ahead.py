"""`offload.depth=auto`: tries look-aheads in the first steps of a run, and keeps one. Losses do not depend on it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from offload.tables import FIRST_DEPTH, EngramTables

TRIED = (1, 2, 4)
"""Look-aheads, ascending."""
WARMUP = 8
"""Steps before the first trial: loops are compiled, and the window fills."""
TIMED = 4
"""Steps of a trial that count. Each look-ahead has two trials, up and down the list, so that a drift favours none."""
WATCHED = 100
"""Steps after which it is asked whether many more rows travel than when look-aheads were tried."""
MORE = 1.5
"""Times the rows fetched a step, from which on they are tried again: early in a run, most rows are drawn."""
HARDLY = 0.005
"""Of a step: what the chosen look-ahead may cost more than the best."""


@dataclass(frozen=True)
class Choice:
    """A look-ahead that was chosen.

    Attributes:
        depth: the look-ahead.
        cost_s: by look-ahead, the slowest rank's seconds a step that are compared: on a GPU the whole step, elsewhere
            the loop's wait for rows. (The host of a GPU does not wait for what the GPU waits for.)
        step_s: of a step, over all trials; None if nothing was tried.
    """

    depth: int
    cost_s: dict[int, float]
    step_s: float | None

    def __str__(self) -> str:
        if self.step_s is None:
            return f"offload.depth: {self.depth} (too few steps are left to try others)"
        costs = ", ".join(f"{1e3 * cost:.1f} at {depth}" for depth, cost in self.cost_s.items())
        return f"offload.depth: {self.depth} (of a step of {1e3 * self.step_s:.0f} ms, compared: {costs})"


def least_depth(cost_s: dict[int, float], step_s: float) -> int:
    """The smallest look-ahead that costs hardly more than the best."""
    least = min(cost_s.values())
    return min(depth for depth, cost in cost_s.items() if cost <= least + HARDLY * step_s)


def schedule(warmup: int) -> list[tuple[int, bool]]:
    """The look-ahead of each step, and whether the step counts: not before those are done that another one fetched."""
    steps, before = [(FIRST_DEPTH, False)] * warmup, FIRST_DEPTH
    for depth in (*TRIED, *reversed(TRIED)):
        settling = 0 if depth == before else max(depth, before)
        steps += [(depth, False)] * settling + [(depth, True)] * TIMED
        before = depth
    return steps


class LookAhead:
    """Sets a run's look-ahead, on all ranks alike.

    Args:
        tables: whose look-ahead.
        device: that the ranks communicate from.
        steps: of the whole run.
        tell: hears of each choice.
    """

    def __init__(
        self, tables: EngramTables, device: torch.device, steps: int, tell: Callable[[Choice], object]
    ) -> None:
        self._tables, self._device, self._steps, self._tell = tables, device, steps, tell
        self._coming: deque[tuple[int, bool]] | None = None  # of a trial; None before the first step
        self._trying = False
        self._seconds, self._costs = 0.0, dict.fromkeys(TRIED, 0.0)
        self._depth, self._counted, self._fetched, self._fetched_then = FIRST_DEPTH, 0, 0, 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step (from 0). Collective where something is decided."""
        if self._coming is None and not self._try(number, WARMUP):
            self._tell(Choice(self._depth, {}, None))
        depth, counts = self._coming.popleft() if self._coming else (self._depth, True)
        self._tables.look_ahead(depth)
        before, started = self._tables.traffic, time.perf_counter()
        yield
        if not counts:
            return
        seconds, since = time.perf_counter() - started, self._tables.traffic.since(before)
        self._counted += 1
        self._fetched += since.fetched
        if self._trying:
            self._seconds += seconds
            self._costs[depth] += seconds if self._device.type == "cuda" else since.waited_s
            if not self._coming:
                self._choose()
        elif self._counted == WATCHED:
            self._watch(number + 1)

    def _try(self, number: int, warmup: int) -> bool:
        """Begins trials, if there are steps enough."""
        coming = schedule(warmup)
        fits = len(coming) < self._steps - number
        self._coming, self._trying = deque(coming if fits else ()), fits
        self._seconds, self._costs = 0.0, dict.fromkeys(TRIED, 0.0)
        self._counted = self._fetched = 0
        return fits

    def _choose(self) -> None:
        each = 2 * TIMED
        seconds_a_step = [self._seconds / len(TRIED) / each, *(cost / each for cost in self._costs.values())]
        step_s, *costs = self._of_all(seconds_a_step, dist.ReduceOp.MAX)
        cost_s = dict(zip(TRIED, costs, strict=True))
        self._depth, self._fetched_then, self._trying = least_depth(cost_s, step_s), self._fetched_a_step(), False
        self._tell(Choice(self._depth, cost_s, step_s))

    def _watch(self, number: int) -> None:
        if self._fetched_a_step() > MORE * self._fetched_then:
            self._try(number, 0)

    def _fetched_a_step(self) -> float:
        """Of all ranks, since the last call or trial."""
        (fetched,) = self._of_all([self._fetched / self._counted], dist.ReduceOp.SUM)
        self._counted = self._fetched = 0
        return fetched

    def _of_all(self, numbers: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        found = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(found, how)
        return found.tolist()
