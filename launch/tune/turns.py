"""What a turn of a point came to, and what the turns of several points say about each other."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def mean_ms(self) -> float:
        """Of a step. The mean, as a deep look-ahead that is too slow waits only now and then, but long."""
        return statistics.fmean(self.step_ms)

    @cached_property
    def error(self) -> float:
        """Standard error of the mean, as a share of it."""
        if len(self.step_ms) < 2:
            return 0.0
        return float(statistics.stdev(self.step_ms) / len(self.step_ms) ** 0.5 / self.mean_ms)


@dataclass(frozen=True)
class Costs:
    """What a step takes at each point, as a share of the mean step of a round; comparable over rounds.

    Attributes:
        of: by point.
        error: standard error of one of them.
    """

    of: dict[Point, float]
    error: float


def costs(turns: Sequence[Turn]) -> Costs:
    """Compares points by their turns.

    A machine that is slower in one round is so for all of its points, so rounds are compared within: by the points that
    all of them have, since slow ones are left out of later rounds. And what a step takes beside its waiting for rows,
    which nearly all noise is in, hardly differs between points: differences that are no larger than the noise are
    shrunk towards none, as far as noise explains them (the estimator of James and Stein).
    """
    waits, rests = _relative(turns)
    if not rests:
        return Costs({}, 0.0)
    rest = {point: statistics.fmean(its) for point, its in rests.items()}
    common = statistics.fmean(rest.values())
    noise = _noise(turns, rests)
    found = statistics.pvariance(rest.values())
    kept = max(0.0, found - noise) / found if found > 0 else 1.0
    of = {point: common + kept * (rest[point] - common) + statistics.fmean(waits[point]) for point in rest}
    return Costs(of, math.sqrt(kept * noise))


def _relative(turns: Sequence[Turn]) -> tuple[dict[Point, list[float]], dict[Point, list[float]]]:
    """By point, waiting and the rest of a step in each of its rounds, as shares of the round's mean step."""
    rounds: dict[int, dict[Point, Turn]] = {}
    for turn in turns:
        rounds.setdefault(turn.round, {})[turn.point] = turn
    common = set.intersection(*(set(its) for its in rounds.values())) if rounds else set()
    waits: dict[Point, list[float]] = {}
    rests: dict[Point, list[float]] = {}
    for its in rounds.values():
        base = statistics.fmean(its[point].mean_ms for point in common or its)
        for point, turn in its.items():
            waits.setdefault(point, []).append(turn.stall_ms / base)
            rests.setdefault(point, []).append((turn.mean_ms - turn.stall_ms) / base)
    return waits, rests


def _noise(turns: Sequence[Turn], rests: dict[Point, list[float]]) -> float:
    """Variance of a point's mean that is noise: by its steps, or by its rounds, whichever says more."""
    by_steps = statistics.fmean(turn.error**2 for turn in turns)
    repeated = [statistics.variance(its) for its in rests.values() if len(its) > 1]
    by_rounds = statistics.fmean(repeated) if repeated else 0.0
    rounds = statistics.fmean(len(its) for its in rests.values())
    return max(by_steps, by_rounds) / rounds
