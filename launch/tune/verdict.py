"""What the turns of all points came to, and which point to take, with the reason."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.bench.measure import Spread
from launch.tune.points import Point
from launch.tune.results import Results
from launch.tune.turns import HARDLY, Turn, costs

_WAITS = 0.02
"""Of a step: a stall that is worth a word."""


@dataclass(frozen=True)
class Line:
    """A point, over all its turns.

    Attributes:
        point: the settings.
        turns: how many.
        step_ms: of all timed steps.
        mean_ms: of a turn's step; the median over the turns.
        stall_ms, plan_ms, hit_rate: means.
        device_bytes, host_bytes: the most.
        settled: whether the window had settled in every turn.
    """

    point: Point
    turns: int
    step_ms: Spread
    mean_ms: float
    stall_ms: float
    plan_ms: float
    hit_rate: float
    device_bytes: int
    host_bytes: int
    settled: bool

    @classmethod
    def of(cls, point: Point, turns: Sequence[Turn]) -> "Line":
        """From at least one turn of the point."""
        return cls(
            point,
            len(turns),
            Spread.of([step for turn in turns for step in turn.step_ms]),
            statistics.median(turn.mean_ms for turn in turns),
            statistics.fmean(turn.stall_ms for turn in turns),
            statistics.fmean(turn.plan_ms for turn in turns),
            statistics.fmean(turn.hit_rate for turn in turns),
            max(turn.device_bytes for turn in turns),
            max(turn.host_bytes for turn in turns),
            all(turn.settled for turn in turns),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)


def lines(results: Results) -> dict[Point, Line]:
    """All points that were measured, by window and look-ahead."""
    by_point: dict[Point, list[Turn]] = {}
    for turn in results.turns:
        by_point.setdefault(turn.point, []).append(turn)
    ordered = sorted(by_point, key=lambda point: (point.build[1:] != _first(results).build[1:], *point.cost))
    return {point: Line.of(point, by_point[point]) for point in ordered}


def reasons(results: Results, measured: dict[Point, Line]) -> Iterator[str]:
    """Why the best point is to be taken, a sentence each."""
    best = results.best
    if best is None or best not in measured:
        return
    mine = measured[best]
    of_stage = [turn for turn in results.turns if turn.stage == max(t.stage for t in results.turns if t.point == best)]
    compared = costs(of_stage).of
    fastest = min(compared, key=lambda point: compared[point])
    if fastest == best:
        yield f"no other setting was faster: {mine.mean_ms:.1f} ms a step, {mine.stall_ms:.1f} of them waiting for rows"
    else:
        yield (
            f"it takes {_more(compared, best, fastest)} time than the fastest ({fastest}), which is within "
            f"{HARDLY:.0%}, and it needs less memory or fewer cores"
        )
    yield from _neighbours(best, mine, measured)
    start = _first(results)
    if start != best and start in compared and best in compared:
        yield f"the config's own setting ({start}) takes {_more(compared, start, best)} time a step"


def notes(results: Results, measured: dict[Point, Line]) -> Iterator[str]:
    """What else is to be known of the recommendation, a sentence each."""
    best = results.best
    if best is not None and best in measured:
        mine = measured[best]
        deeper = [
            line.stall_ms for point, line in measured.items() if point.build == best.build and _deeper(point, best)
        ]
        if mine.stall_ms > _WAITS * mine.mean_ms and deeper:
            yield (
                f"rows still make a step wait for {mine.stall_ms:.1f} ms, and a deeper look-ahead does not help: they "
                "travel more slowly than the model computes. Fewer or smaller ones would: a larger window, "
                "offload.row_dtype=bf16, offload.optimizer.state_dtype=bf16"
            )
        if not mine.settled:
            yield "many rows still entered its window when it was measured: late in a run more of them are hits"
    if left := len([point for point in results.points if point not in measured]):
        yield f"{left} of {len(results.points)} look-aheads and windows were not measured"
    if not results.finished:
        yield "the time was over before everything was measured: the same command with more --minutes goes on"


def _deeper(point: Point, than: Point) -> bool:
    return point.depth > than.depth and point.planner_threads == than.planner_threads


def _neighbours(best: Point, mine: Line, measured: dict[Point, Line]) -> Iterator[str]:
    """What less would cost, and more would gain."""
    same = [point for point in measured if point.build == best.build and point.planner_threads == best.planner_threads]
    if shallower := [point for point in same if point.depth < best.depth]:
        nearest = measured[max(shallower, key=lambda point: point.depth)]
        yield (
            f"at depth {nearest.point.depth} a step waits {nearest.stall_ms:.1f} ms for rows, "
            f"at depth {best.depth} {mine.stall_ms:.1f}"
        )
    others = [point for point in measured if (point.depth, *point.build[1:]) == (best.depth, *best.build[1:])]
    if larger := [point for point in others if point.window_rows > best.window_rows]:
        most = measured[max(larger, key=lambda point: point.window_rows)]
        yield (
            f"a window of {most.point.window_rows:,} slots has {most.hit_rate:.0%} hits instead of "
            f"{mine.hit_rate:.0%}, and a step takes {most.mean_ms:.1f} ms instead of {mine.mean_ms:.1f}"
        )


def _more(compared: dict[Point, float], point: Point, than: Point) -> str:
    share = compared[point] / compared[than] - 1
    return f"{abs(share):.1%} {'more' if share >= 0 else 'less'}"


def _first(results: Results) -> Point:
    assert results.start is not None
    return results.start


def to_json(results: Results, changes: dict[str, Any]) -> dict[str, Any]:
    """Everything, as JSON can hold it; `changes` are the settings to write."""
    measured = lines(results)
    return {
        "configured": asdict(_first(results)),
        "recommended": asdict(results.best) if results.best else None,
        "changes": changes,
        "reasons": list(reasons(results, measured)),
        "notes": list(notes(results, measured)),
        "finished": results.finished,
        "seconds": results.seconds,
        "points": [measured[point].to_json() for point in measured],
        "not_measured": [asdict(point) for point in results.points if point not in measured],
        "turns": [asdict(turn) for turn in results.turns],
    }
