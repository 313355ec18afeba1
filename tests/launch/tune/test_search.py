"""The search: what is tried, what is left out, and that what it ends with is as good as the best there is."""

import random
from dataclasses import replace

import pytest

from launch.tune.points import Point, engines, grid, planners, windows
from launch.tune.search import FINALISTS, Search, least_of_the_best, survivors
from launch.tune.turns import HARDLY, Turn, costs
from tests.grid import grid as combinations

ALLOWED = 0.03
"""For planner threads, which make no step wait: 3 % may be lost in noise."""
START = Point(1, 50_000, "cpu", 1, None)
SNUG = {0: 20_000, 1: 30_000, 2: 40_000, 4: 60_000}
POINTS = grid(START, SNUG, windows(SNUG, 500_000, 10**9, START.window_rows), every=False)


def turn(point: Point, step_ms: float, stage: int = 0, number: int = 0) -> Turn:
    steps = (step_ms, step_ms)
    return Turn(point, stage, number, steps, 0.0, 0.0, 1.0, 0.0, 0.0, 0, 0, settled=True)


def true_ms(point: Point, link: float) -> float:
    """A step of 100 ms, whose rows take `link` of it each way; a larger window has fewer of them on the way."""
    return works_ms(point) + waits_ms(point, link)


def works_ms(point: Point) -> float:
    """Of a step, beside its waiting."""
    return 97.0 if point.planner_threads == 2 else 100.0


def waits_ms(point: Point, link: float) -> float:
    """What a step waits for rows."""
    travel, works = link * 100 * (40_000 / point.window_rows) ** 0.5, works_ms(point)
    return max(travel if point.depth == 0 else 0.0, 2 * travel / max(1, point.depth) - works, travel - works)


def searched(search: Search, link: float, noise: float, seed: int, stop: int = 10**6) -> tuple[Point, list[Turn]]:
    """The end of a search that measures with noise, and a machine that is slower by half in every third round."""
    drawn, turns = random.Random(seed), list[Turn]()
    while (coming := search.next(turns)[0]) and len(turns) < stop:
        point = coming.points[0]
        drift = 1.5 if coming.round % 3 == 1 else 1.0
        ms = [drift * (works_ms(point) * (1 + drawn.gauss(0, noise)) + waits_ms(point, link)) for _ in range(8)]
        measured = turn(point, 0.0, coming.stage, coming.round)
        turns.append(replace(measured, step_ms=tuple(ms), stall_ms=drift * waits_ms(point, link)))
    return search.next(turns)[1], turns


def search_of(*, halving: bool = True) -> Search:
    return Search(START, [lambda best: POINTS, lambda best: planners(best, 2)], halving=halving)


@pytest.mark.parametrize(("link", "noise"), combinations([0.1, 0.4, 0.7, 1.0, 2.0], [0.03, 0.2, 0.0]))
def test_it_ends_within_two_per_cent_of_the_best_at_half_the_turns(link: float, noise: float) -> None:
    search, everything = search_of(), search_of(halving=False)
    least = min(true_ms(replace(point, planner_threads=2), link) for point in POINTS)
    for seed in range(10 if noise else 1):
        best, turns = searched(search, link, noise, seed)
        assert true_ms(best, link) <= (1 + HARDLY + ALLOWED) * least, f"seed {seed}: {best}"
    assert len(turns) < 0.6 * len(searched(everything, link, noise, 0)[1])


def test_of_points_that_are_as_good_the_one_that_takes_least_is_chosen() -> None:
    best, _ = searched(search_of(), 0.1, 0.0, 0)
    # Nothing ever waits from look-ahead 1 on, whatever the window; more threads are faster here.
    assert best == Point(1, SNUG[1], "cpu", 2, None)
    cheap, dear = sorted(POINTS[:2], key=lambda point: point.cost)
    for slower_ms, wanted in ((0.9, cheap), (1.1, dear)):
        assert least_of_the_best(POINTS, [turn(cheap, 100.0 + slower_ms), turn(dear, 100.0)], START) == wanted


def test_a_search_that_is_resumed_goes_on_where_it_was() -> None:
    _, whole = searched(search_of(), 0.7, 0.03, 5)
    for stop in (1, 7, len(POINTS) + 2, len(whole) - 1):
        coming = search_of().next(whole[:stop])[0]
        assert coming is not None
        assert (coming.points[0], coming.stage, coming.round) == (
            whole[stop].point,
            whole[stop].stage,
            whole[stop].round,
        )


def test_a_search_that_was_cut_short_names_the_best_that_it_has_measured() -> None:
    assert search_of().next([])[1] == START
    slow, fast = POINTS[0], POINTS[3]
    assert search_of().next([turn(slow, 150.0), turn(fast, 100.0)])[1] == fast


def test_the_configured_point_stays_to_be_compared_with_and_equally_fast_ones_that_take_less_stay() -> None:
    cheapest_first = sorted((point for point in POINTS if point != START), key=lambda point: point.cost)
    turns = [turn(point, 100.9 - 0.01 * place) for place, point in enumerate(cheapest_first)]
    kept = survivors(POINTS, [*turns, turn(START, 300.0)], START)
    assert {START, cheapest_first[0], cheapest_first[-1]} <= set(kept)
    assert FINALISTS <= len(kept) <= len(POINTS) // 2 + 2


def test_a_round_in_which_the_machine_was_slow_favours_nobody() -> None:
    one, other = POINTS[:2]
    turns = [turn(one, 100.0, number=0), turn(other, 110.0, number=0), turn(one, 200.0, number=1)]
    for found in (costs([*turns, turn(other, 220.0, number=1)]), costs(turns)):
        assert found.of[other] / found.of[one] == pytest.approx(1.1)


def test_noise_beside_the_waiting_does_not_decide_but_what_repeats_does() -> None:
    waits, works = POINTS[:2]

    def turns(rests: list[tuple[float, float]]) -> list[Turn]:
        """One waits 10 ms a step; what the steps take besides is given, round by round."""
        return [
            replace(turn(point, rest + stall, number=number), stall_ms=stall)
            for number, both in enumerate(rests)
            for point, stall, rest in zip((waits, works), (10.0, 0.0), both, strict=True)
        ]

    noisy = costs(turns([(70.0, 140.0), (120.0, 90.0), (80.0, 100.0)]))
    assert noisy.of[works] < noisy.of[waits], "noise has decided"
    steady = costs(turns([(70.0, 100.0), (71.0, 101.0), (70.0, 100.0)]))
    assert steady.of[works] > steady.of[waits], "a difference that repeats is taken for noise"
    assert costs([]).of == {}


def test_windows_hold_what_a_look_ahead_needs_and_fit() -> None:
    assert windows(SNUG, 500_000, 10**9, 50_000) == [20_000, 30_000, 40_000, 50_000, 60_000, 120_000]
    assert windows(SNUG, 100_000, 10**9, 50_000) == [20_000, 30_000, 40_000, 50_000, 60_000, 100_000]
    assert windows(SNUG, 500_000, 59_000, 50_000) == [20_000, 30_000, 40_000, 50_000]
    assert windows(SNUG, 500_000, 10**9, 41_000) == [20_000, 30_000, 41_000, 60_000, 120_000]
    assert windows(SNUG, 500_000, 10**9, 900_000) == [20_000, 30_000, 40_000, 60_000, 120_000, 500_000]
    assert all(point.window_rows >= SNUG[point.depth] or point == START for point in POINTS)
    assert {(point.depth, point.window_rows) for point in grid(START, SNUG, [20_000, 60_000], every=True)} == {
        (depth, rows) for depth in SNUG for rows in (20_000, 60_000)
    }


def test_engines_vary_where_there_is_a_choice_and_threads_as_far_as_there_are_cores() -> None:
    on_gpu = replace(START, engine="zero_copy")
    assert engines(on_gpu, []) == []
    assert [(point.engine, point.programs) for point in engines(on_gpu, ["zero_copy", "staged"])] == [
        ("zero_copy", None),
        ("staged", None),
        ("zero_copy", 4),
        ("zero_copy", 8),
        ("zero_copy", 16),
    ]
    assert [point.planner_threads for point in planners(START, 3)] == [1, 2]
    assert planners(START, 1) == [START]
