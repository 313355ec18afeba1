"""The recommendation is held to a sweep of all points: `tests/launch/tune/sweep.py`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launch.tune.points import Point
from launch.tune.turns import Turn
from tests.launch.tune.sweep import ALLOWED, judge, run_case

GOOD, BAD, BEST = (Point(depth, 1000, "cpu", 1, None) for depth in (1, 0, 2))


def answer(recommended: Point, ms: dict[Point, list[float]]) -> dict[str, Any]:
    turns = [
        asdict(Turn(point, 0, number, (step_ms,), 0.0, 0.0, 1.0, 0.0, 0.0, 0, 0, settled=True))
        for point, steps in ms.items()
        for number, step_ms in enumerate(steps)
    ]
    return {"recommended": asdict(recommended), "configured": asdict(BAD), "turns": turns, "finished": True}


def test_a_recommendation_is_met_within_two_per_cent_or_twice_the_spread() -> None:
    steady = {GOOD: [101.0, 101.0, 202.0], BAD: [110.0, 110.0, 220.0], BEST: [100.0, 100.0, 200.0]}
    for recommended, off, met in ((BEST, 0.0, True), (GOOD, 0.01, True), (BAD, 0.1, False)):
        case = judge(20, 1, answer(recommended, {}), answer(BEST, steady))
        assert (case.off, case.met) == (pytest.approx(off), met)
        assert case.limit == ALLOWED
        assert (case.best, case.best_ms) == ((2, 1000), 100.0)
    noisy = {GOOD: [90.0, 110.0, 100.0], BAD: [115.0, 105.0, 110.0], BEST: [95.0, 105.0, 100.0]}
    assert judge(20, 1, answer(BAD, {}), answer(BEST, noisy)).limit > 0.05


@pytest.mark.long  # the whole is `python -m tests.launch.tune.sweep`
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_recommended_behind_a_slow_link_is_as_good_as_the_best_of_a_sweep(ranks: int, tmp_path: Path) -> None:
    case = run_case(tmp_path, 50, ranks, (2.0, 3.0))
    assert case.met, case.row()
    assert case.recommended[0] > 0, "behind such a link a step without look-ahead waits"
