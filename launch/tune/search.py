"""Which point is measured next: successive halving, as a function of what was measured, so that it can be resumed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

from launch.tune.points import Point
from launch.tune.turns import HARDLY, Turn, costs

ROUNDS, SWEPT_ROUNDS = 5, 3
"""Of a stage; and where no point is ever left out."""
FINALISTS = 3
"""Points that are never left out."""

Stage = Callable[[Point], list[Point]]
"""The points of a stage, from the best of the one before."""


@dataclass(frozen=True)
class Coming:
    """What is left of a round.

    Attributes:
        stage, round: counted from 0.
        points: not measured in it yet, in their order.
        alive: all points of the round.
    """

    stage: int
    round: int
    points: list[Point]
    alive: list[Point]


@dataclass(frozen=True)
class Search:
    """Stage after stage, round after round.

    Attributes:
        start: the configured point; it stays until the end of the first stage, to be compared with.
        stages: the first has the look-aheads and windows; each following one varies something of the best so far.
        halving: whether later rounds have fewer points.
        rounds: of a stage.
    """

    start: Point
    stages: Sequence[Stage]
    halving: bool = True
    rounds: int = ROUNDS

    def next(self, turns: Sequence[Turn]) -> tuple[Coming | None, Point]:
        """What to measure now, None when everything was; and the best point so far."""
        best = self.start
        for stage, points_of in enumerate(self.stages):
            if len(alive := points_of(best)) < 2:
                continue
            mine = [turn for turn in turns if turn.stage == stage]
            for number in range(self.rounds):
                done = {turn.point for turn in mine if turn.round == number}
                if left := [point for point in alive if point not in done]:
                    # There and back: neighbours share a window, and whoever came first comes last.
                    coming = Coming(stage, number, left[:: -1 if number % 2 else 1], alive)
                    return coming, least_of_the_best(alive, mine, best)
                if self.halving and number < self.rounds - 1:
                    alive = survivors(alive, [turn for turn in mine if turn.round <= number], self.start)
            best = least_of_the_best(alive, mine, best)
        return None, best

    def turns_of_all_rounds(self, points: int) -> int:
        """How many turns the first stage takes."""
        total = 0
        for _ in range(self.rounds):
            total += points
            points = max(min(points, FINALISTS), ceil(points / 2)) + 1 if self.halving else points
        return total


def survivors(points: Sequence[Point], turns: Sequence[Turn], start: Point) -> list[Point]:
    """The faster half, of which half again are the cheapest of those that are as good as the fastest.

    Otherwise noise would decide which of many equally fast points is left, and the cheap ones would go. The configured
    point always stays.
    """
    compared = costs(turns)
    found = {point: compared.of[point] for point in points}
    count = max(FINALISTS, ceil(len(points) / 2))
    if len(points) <= count:
        return list(points)
    limit = min(found.values()) * (1 + max(HARDLY, compared.error))
    fastest = sorted(points, key=lambda point: found[point])
    cheapest = sorted((point for point in points if found[point] <= limit), key=lambda point: point.cost)
    kept = set(cheapest[: count // 2])
    kept |= set([point for point in fastest if point not in kept][: count - len(kept)])
    return [point for point in points if point in kept or point == start]


def least_of_the_best(points: Sequence[Point], turns: Sequence[Turn], otherwise: Point) -> Point:
    """The cheapest of the points that are as good as the fastest; `otherwise` if none was measured."""
    found = {point: cost for point, cost in costs(turns).of.items() if point in points}
    limit = min(found.values(), default=0.0) * (1 + HARDLY)
    return min((point for point in found if found[point] <= limit), key=lambda point: point.cost, default=otherwise)
