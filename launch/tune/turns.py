"""What a turn of a point came to, and what the turns of several points say about each other."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launch.tune.points import Point

HARDLY = 0.01
"""What a point may take longer than the fastest one and still be as good."""


@dataclass(frozen=True)
class Turn:
    """Some steps of the job at one point; the slowest rank's where ranks differ.

    Attributes:
        point: the settings.
        stage, round: of the search.
        step_ms: of each timed step on rank 0.
        stall_ms: a step, that the loop waited for plans and rows.
        plan_ms: a step, that the planner's thread worked.
        hit_rate: share of the rows of steps that were in the window.
        fetched, written_back: rows a step, of all ranks.
        device_bytes: that a rank held on its device at most; without a GPU, its window.
        host_bytes: that the processes of all ranks held at the end.
        settled: whether the window was full, or but few rows still entered it.
    """

    point: Point
    stage: int
    round: int
    step_ms: tuple[float, ...]
    stall_ms: float
    plan_ms: float
    hit_rate: float
    fetched: float
    written_back: float
    device_bytes: int
    host_bytes: int
    settled: bool

    @property
    def mean_ms(self) -> float:
        """Of a step. The mean, as a deep look-ahead that is too slow waits only now and then, but long."""
        return statistics.fmean(self.step_ms)

    @property
    def error(self) -> float:
        """Standard error of the mean, as a share of it."""
        if len(self.step_ms) < 2:
            return 0.0
        return float(statistics.stdev(self.step_ms) / len(self.step_ms) ** 0.5 / self.mean_ms)


def ratios(points: Iterable[Point], turns: Sequence[Turn]) -> dict[Point, float]:
    """How long each point's step takes, as a share of that of the others of its round: the median over its rounds.

    A machine that is slower in one round is so for all of its points. Each round is compared by the points that every
    round has, since the slow ones are left out of later rounds.
    """
    rounds: dict[int, dict[Point, float]] = {}
    for turn in turns:
        rounds.setdefault(turn.round, {})[turn.point] = turn.mean_ms
    common = set.intersection(*(set(its) for its in rounds.values())) if rounds else set()
    found: dict[Point, list[float]] = {}
    for its in rounds.values():
        base = statistics.fmean(its[point] for point in common) if common else 1.0
        for point, mean_ms in its.items():
            found.setdefault(point, []).append(mean_ms / base)
    return {point: statistics.median(found[point]) for point in points if point in found}


def spread(turns: Sequence[Turn]) -> float:
    """How uncertain a comparison of points is, as a share: the median standard error of a point's mean."""
    by_point: dict[Point, list[float]] = {}
    for turn in turns:
        by_point.setdefault(turn.point, []).append(turn.error)
    errors = [statistics.fmean(its) / len(its) ** 0.5 for its in by_point.values()]
    return statistics.median(errors) if errors else 0.0
