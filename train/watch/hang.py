"""Detects that no rank makes progress, names the one that the others wait for, and keeps the stacks of all threads.

Every rank watches itself. One that is stopped, or lost, cannot; but those that wait for it are stuck as well, and look
at everyone's heartbeat.
"""

import faulthandler
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from train.errors import Hung
from train.watch.flight_recorder import STACKS, write_operations
from train.watch.heartbeat import SLOWEST_BEAT_S, Beat, Heartbeat, Memory, beat_path

_STORE_S = 10.0
_BEATS_A_LIMIT = 4


class HangWatch:
    """Watches this rank's progress; `leave` is given the `Hung` that ends it, from a thread.

    Args:
        folder: of the run.
        rank: of this process.
        ranks: that see the folder.
        limit_s: longest time in one stage, while this process runs at all.
        leave: ends this process.
        store: where all ranks' heartbeats are, if those of some are not in the folder.
        memory: see `Heartbeat`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: Sequence[int],
        limit_s: float,
        leave: Callable[[BaseException], None],
        store: dist.Store | None = None,
        memory: Memory = lambda: (0, 0),
    ) -> None:
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._limit_s, self._leave = limit_s, leave
        if store:
            store.set_timeout(timedelta(seconds=_STORE_S))
        self._store = store
        self._beat_s = min(SLOWEST_BEAT_S, limit_s / _BEATS_A_LIMIT)
        self._entered, self._stuck_s, self._looked, self._begun = -1, 0.0, 0.0, False
        self.heartbeat = Heartbeat(folder, rank, self._beat_s, self._look, store, memory)

    def begin(self) -> None:
        """From now on the time counts."""
        self._begun = True

    def _look(self) -> None:
        if not self._begun:
            return
        now = time.monotonic()
        # A process that was stopped, or a machine that slept, has not been stuck for all that time.
        passed_s, self._looked = min(now - self._looked, 2 * self._beat_s), now
        beat = self.heartbeat.now()
        self._stuck_s = self._stuck_s + passed_s if beat.entered == self._entered else 0.0
        self._entered = beat.entered
        if self._stuck_s >= self._limit_s:
            stacks = self._dump_stacks(beat)
            self._leave(Hung(f"train.hang_s: {self._culprit()}; stacks of all threads: {stacks}"))

    def _dump_stacks(self, beat: Beat) -> Path:
        path = self._folder / STACKS / f"step-{beat.step:08d}-rank-{self._rank:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_operations(self._folder, self._rank)
        return path.parent

    def _culprit(self) -> str:
        before = self._beats()
        # Long enough for every rank that lives to beat again.
        deadline = time.monotonic() + 3 * self._beat_s
        while time.monotonic() < deadline:
            self.heartbeat.beat()
            time.sleep(self._beat_s / 2)
        now = self._beats()
        # The store may have been lost in between, and with it the beats of other hosts.
        ranks = sorted(before.keys() & now.keys())
        return told([before[rank] for rank in ranks], [now[rank] for rank in ranks], self._limit_s)

    def _beats(self) -> dict[int, Beat | None]:
        """The last beat of all ranks that can be looked at, by rank."""
        if self._store:
            try:
                return {rank: Beat.heard(self._store, rank) for rank in range(dist.get_world_size())}
            except RuntimeError:
                self._store = None
        return {rank: Beat.read(beat_path(self._folder, rank)) for rank in self._ranks}


def told(before: list[Beat | None], now: list[Beat | None], limit_s: float) -> str:
    """Who is stuck, and where, from two looks at all ranks' heartbeats, between which each was due."""
    beats = [beat for beat in now if beat is not None]
    silent = [rank for rank, (old, new) in enumerate(zip(before, now, strict=True)) if new is None or old == new]
    if silent:
        rank, beat = silent[0], now[silent[0]]
        where = f" in {_place(beat)}, on {beat.host}, process {beat.pid}" if beat else ""
        return f"{_ranks(silent)} gave no sign of life any more: rank {rank} was last seen{where or ' nowhere'}"
    least = min(beat.entered for beat in beats)
    behind = [beat for beat in beats if beat.entered == least]
    if len(behind) == len(beats):
        return f"no rank made progress for {limit_s:g} s: all are in {_place(beats[0])}"
    ahead = max(beats, key=lambda beat: beat.entered)
    return (
        f"{_ranks([beat.rank for beat in behind])} made no progress for {limit_s:g} s in {_place(behind[0])}, on "
        f"{behind[0].host}, process {behind[0].pid}; others wait in {_place(ahead)}"
    )


def _place(beat: Beat) -> str:
    return f"step {beat.step}, stage {beat.stage}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
