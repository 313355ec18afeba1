"""Finds out that no rank makes progress, names the one that the others wait for, and keeps the stacks of all threads.

Every rank watches itself. One that is stopped, or lost, cannot; but those that wait for it are stuck as well, and look
at everyone's heartbeat.
"""

import faulthandler
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from train.errors import Hung
from train.watch.heartbeat import SLOWEST_BEAT_S, Beat, Heartbeat, Memory, beat_path

STACKS = "stacks"
"""Folder, in that of the run, with the stacks of ranks that hung."""
_BEATS_A_LIMIT = 4


class HangWatch:
    """Watches this rank's progress; `leave` gets the `Hung` that ends it, from a thread.

    Args:
        folder: of the run.
        rank: of this process.
        ranks: that see the folder.
        limit_s: longest time in one stage, while this process runs at all.
        memory: see `Heartbeat`.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: Sequence[int],
        limit_s: float,
        leave: Callable[[BaseException], None],
        memory: Memory = lambda: (0, 0),
    ) -> None:
        self._folder, self._rank, self._ranks = folder, rank, ranks
        self._limit_s, self._leave = limit_s, leave
        self._beat_s = min(SLOWEST_BEAT_S, limit_s / _BEATS_A_LIMIT)
        self._entered, self._stuck_s, self._looked, self._begun = -1, 0.0, 0.0, False
        self.heartbeat = Heartbeat(folder, rank, self._beat_s, self._look, memory)

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
        return path.parent

    def _culprit(self) -> str:
        paths = [beat_path(self._folder, rank) for rank in self._ranks]
        before = [Beat.read(path) for path in paths]
        # Long enough for every rank that lives to beat again.
        deadline = time.monotonic() + 3 * self._beat_s
        while time.monotonic() < deadline:
            self.heartbeat.beat()
            time.sleep(self._beat_s / 2)
        return told(before, [Beat.read(path) for path in paths], self._limit_s)


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


def set_up_flight_recorder(folder: Path) -> None:
    """Has NCCL keep its last operations, and write them into the run's folder when one does not end.

    To be called before its groups are made. What the user has set stays.
    """
    stacks = (folder / STACKS).absolute()
    with suppress(OSError):  # a folder that cannot be made is told when the run opens it
        stacks.mkdir(parents=True, exist_ok=True)
    wanted = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(stacks / "nccl-rank-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
