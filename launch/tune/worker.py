"""A rank that tunes: trains the job's points in turns, as rank 0 says, which keeps what they came to."""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from launch.local.failures import reported
from launch.plan.rows.replay import replay
from launch.plan.rows.stream import TextStream
from launch.tune import points as grid_of
from launch.tune.asked import Asked
from launch.tune.job import MOST_FILLING, TunedJob
from launch.tune.points import Point
from launch.tune.results import Results
from launch.tune.search import ROUNDS, SWEPT_ROUNDS, Search
from launch.tune.turns import Turn
from offload.host.cores import usable_cores
from train.config.file import load
from train.config.job import JobConfig
from train.progress import Progress
from train.ranks import join_ranks

_STARTED = time.monotonic()
_LOOKUPS, _FEWEST, _MOST = 1 << 26, 6, 12
"""Of the replay that says which windows are worth a trial; and its steps."""
_LEAST_STEPS, _MOST_STEPS, _UNTIMED = 4, 24, 3
"""Of a turn; and about so many before those that are timed."""
_SHARE = 0.6
"""Of the time, for the first stage."""
_LATER = 1.2
"""Times the longest turn, which the next one may take."""


def tune(asked: Asked) -> None:
    """Tunes as the rank that RANK and WORLD_SIZE say; rank 0 leaves its results in the folder. Collective.

    Raises:
        UserError: the job cannot be trained.
    """
    job = load(asked.config, asked.overrides, JobConfig)
    join_ranks(job.launch.timeout_s)
    start = Point.of(job.offload)
    with Progress("tune", active=dist.get_rank() == 0) as progress:
        progress.line("building the job, as late in its run: every row counts as updated")
        tuned = TunedJob(asked.config, asked.overrides, f"{asked.work}/{dist.get_rank()}", start)
        step_s, room_rows = tuned.warm_up(), tuned.room_rows()
        # Rank 0 alone decides: clocks differ, and a turn needs all ranks.
        leader = Leader(asked, tuned, step_s, room_rows, progress) if dist.get_rank() == 0 else None
        while coming := tuned.everyones(leader.next() if leader else None):
            turn = tuned.turn(*coming)
            if leader:
                leader.took(coming[0], turn)
        if leader:
            leader.end()


class Leader:
    """Rank 0's: which turn is next, until all are done or the time is over, and what they came to.

    Args:
        asked: by the user.
        tuned: the job.
        step_s: of a step, about.
        room_rows: the largest window there is room for.
        progress: to report to.
    """

    def __init__(self, asked: Asked, tuned: TunedJob, step_s: float, room_rows: int, progress: Progress) -> None:
        self._asked, self._progress = asked, progress
        self._results = results = Results.read(Path(asked.folder), asked.digest)
        self._earlier_s, self._longest_s = results.seconds, 0.0
        self._refused: set[Point] = set()
        if not results.points:
            progress.line("replaying steps, to see which windows are worth a trial")
            results.start, results.shard_rows = tuned.start, tuned.shard_rows
            results.points = _first_points(asked, tuned, room_rows)
        cores = usable_cores() // dist.get_world_size()
        self._search = Search(
            tuned.start,
            [
                lambda best: results.points,
                lambda best: self._possible(grid_of.engines(best, tuned.engines)),
                lambda best: grid_of.planners(best, cores),
            ][: 1 if asked.exhaustive else 3],
            halving=not asked.exhaustive,
            rounds=SWEPT_ROUNDS if asked.exhaustive else ROUNDS,
        )
        self._steps = self._steps_a_turn(step_s)
        progress.expect(self._search.turns_of_all_rounds(len(results.points)))
        progress.line(f"{len(results.points)} points of look-ahead and window, {self._steps} timed steps a turn")

    def next(self) -> tuple[Point, int, int, int] | None:
        """Point, stage, round and steps of the next turn; None at the end. Keeps what is known so far."""
        coming, best = self._search.next(self._results.turns)
        if coming is None or _LATER * self._longest_s > self._left_s:
            return None
        point, done = coming.points[0], len(self._results.turns)
        self._turn_started = time.monotonic()
        self._progress.show(done, f"turn {done + 1}, round {coming.round + 1}: {point}; best so far: {best}")
        return point, coming.stage, coming.round, self._steps

    def took(self, point: Point, turn: Turn | None) -> None:
        """A turn was done; None if the point is not possible here."""
        self._longest_s = max(self._longest_s, time.monotonic() - self._turn_started)
        if turn is None:
            self._refused.add(point)
            self._results.points = self._possible(self._results.points)
            self._progress.line(f"{point}: not possible here")
            return
        self._results.turns.append(turn)
        self._keep()
        self._progress.line(f"{point}: {turn.mean_ms:.1f} ms a step, of which it waits {turn.stall_ms:.1f}")

    def end(self) -> None:
        """Keeps the results, finished or not."""
        self._keep()

    def _keep(self) -> None:
        coming, self._results.best = self._search.next(self._results.turns)
        self._results.finished = coming is None
        self._results.seconds = self._earlier_s + time.monotonic() - _STARTED
        self._results.write(Path(self._asked.folder))

    @property
    def _left_s(self) -> float:
        return 60 * self._asked.minutes - self._earlier_s - (time.monotonic() - _STARTED)

    def _possible(self, points: list[Point]) -> list[Point]:
        return [point for point in points if point not in self._refused]

    def _steps_a_turn(self, step_s: float) -> int:
        points = self._results.points
        turns = self._search.turns_of_all_rounds(len(points))
        filling = self._search.rounds * sum(MOST_FILLING / 2 for _ in {point.build for point in points})
        steps = (_SHARE * self._left_s / step_s - filling) / turns - _UNTIMED
        return max(_LEAST_STEPS, min(_MOST_STEPS, int(steps)))


def _first_points(asked: Asked, tuned: TunedJob, room_rows: int) -> list[Point]:
    """Look-aheads and windows, by what the job's next steps ask of its tables."""
    job, ranks = tuned.job, dist.get_world_size()
    engram, tokens = job.model.engram, job.train.global_batch_size * job.data.sequence_length
    assert engram is not None
    lookups = tokens * engram.lookups_per_token * len(engram.layers)
    steps = max(_FEWEST, min(_MOST, _LOOKUPS // lookups))
    replayed = replay(
        TextStream(job), ranks, job.train.global_batch_size, None, steps=steps - 1, warmup=1, tokens=tokens
    )
    snug = grid_of.snug_windows(replayed, tuned.shard_rows)
    sizes = grid_of.windows(snug, tuned.shard_rows, room_rows, tuned.start.window_rows)
    return grid_of.grid(tuned.start, snug, sizes, every=asked.exhaustive)


if __name__ == "__main__":
    os.dup2(2, 1)  # standard output is the parent's, for its answer alone
    code = reported(lambda: tune(Asked(**json.loads(sys.argv[1]))))
    sys.stderr.flush()
    # Not sys.exit: it waits for threads, and for groups of ranks that may have failed.
    os._exit(code)
