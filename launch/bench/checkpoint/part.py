"""Part `checkpoint`: saves and loads beside what the disk does without them, and steps beside saves."""

import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from launch.bench.checkpoint.disk import forget, read_by_cat, require, settle, written_by_dd
from launch.bench.checkpoint.saved_run import SavedRun, files_of
from launch.bench.measure import Spread, in_turns, queued_s, timed
from launch.bench.options import BenchOptions
from launch.bench.peak_memory import PeakMemory
from launch.bench.report import Cell, Measure, Section
from offload.host.limits import size_text
from offload.rows.records import RecordLayout
from train.checkpoint.parts import PIECE_BYTES
from train.errors import UserError
from train.progress import Progress

_OF_DD, _OF_CAT, _CHECKSUMS, _MEAN, _LONGEST = 0.7, 1.5, 0.1, 1.05, 3.0
_BOUND_MIB = 64
_ROOM = 3  # times the table: a checkpoint, the next one, and what dd writes beside it
_APART = 2.0  # times as long as dd takes for the bytes: between the beginnings of two saves
_WARMUP_STEPS = 20
_FIRST_BESIDE = 2  # the step that the first save beside steps is said to be of
_COMPARED = {"save": "dd", "checksums": "save", "load": "cat", "steps with": "steps without"}


def measure_checkpoint(options: BenchOptions, progress: Progress) -> Section:
    """Measures everything in turns, each once in a round; a round before those shows how much memory it takes.

    Raises:
        Unavailable: host memory does not suffice.
        UserError: the disk does not suffice, or `dd` or `cat` is missing.
    """
    layout = RecordLayout.of(options.workload.dim, options.table_optimizer)
    table_bytes = options.table_mib << 20
    options = replace(options, workload=replace(options.workload, rows=table_bytes // layout.bytes))
    folder = Path(options.folder)
    require(folder, _ROOM * table_bytes)
    run = SavedRun(options, folder)
    try:
        return _Rounds(run, folder, options, progress).measure()
    finally:
        run.close()


class _Rounds:
    """What is measured, by name: seconds of each round, and peaks of memory in bytes."""

    def __init__(self, run: SavedRun, folder: Path, options: BenchOptions, progress: Progress) -> None:
        self._run, self._folder, self._options, self._progress = run, folder, options, progress
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._steps: dict[str, list[list[float]]] = defaultdict(list)
        self._queued_s: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, int] = {}
        self._bytes = 0

    def measure(self) -> Section:
        self._progress.expect(2 * self._options.rounds + 2)
        self._note_memory("save", self._save)
        self._bytes = sum(path.stat().st_size for path in files_of(self._folder))
        self._note_memory("load", self._run.load)
        self._progress.advance()
        for number in range(self._options.rounds):
            self._round(number)
            self._progress.advance()
        self._train()
        return self._section()

    def _round(self, number: int) -> None:
        files = files_of(self._folder)
        readers = {"cat": lambda: read_by_cat(files), "load": lambda: timed(self._run.load)}
        writers = {
            "dd": lambda: written_by_dd(self._folder / "dd", self._bytes, PIECE_BYTES),
            "save": lambda: timed(self._save),
        }
        for name, act in in_turns(readers, number):
            forget(files)
            self._seconds[name].append(act())
        for path in self._folder.iterdir():  # else the save would remove it: that is no writing
            shutil.rmtree(path)
        for name, act in in_turns(writers, number):
            settle()
            self._seconds[name].append(act())
        self._seconds["checksums"].append(self._run.checksums_s())

    def _train(self) -> None:
        """Blocks of steps without a save, and blocks with one, as long as saves lie apart."""
        first = [timed(self._run.step) for _ in range(_WARMUP_STEPS)]
        step_s = statistics.median(first[_WARMUP_STEPS // 2 :])
        count = max(2, math.ceil(_APART * statistics.median(self._seconds["dd"]) / step_s))
        self._note_memory("steps with", lambda: self._steps_beside(count, _FIRST_BESIDE))
        self._progress.advance()
        for number in range(self._options.rounds):
            blocks: dict[str, Callable[[], list[float]]] = {
                "steps without": lambda: [timed(self._run.step) for _ in range(count)],
                "steps with": partial(self._steps_beside, count, _FIRST_BESIDE + 1 + number),
            }
            for name, block in in_turns(blocks, number):
                queued = queued_s()
                self._steps[name].append(block())
                self._queued_s[name] += queued_s() - queued
            self._progress.advance()

    def _steps_beside(self, count: int, saved: int) -> list[float]:
        """Seconds of steps; a save begins with the first, and the last waits for its end, as another save would."""
        taken, checkpoints = [], self._run.checkpoints
        for number in range(count):
            started = time.perf_counter()
            self._run.step()
            if number == 0:
                checkpoints.save_beside(saved, self._run.now)
            for ended in checkpoints.take_ended(wait=number == count - 1):
                if ended.error:
                    raise UserError(ended.error)
            taken.append(time.perf_counter() - started)
        return taken

    def _save(self) -> None:
        self._run.checkpoints.save(1, self._run.now)

    def _note_memory(self, name: str, act: Callable[[], object]) -> None:
        with PeakMemory() as peak:
            act()
        self._peaks[name] = peak.bytes

    def _section(self) -> Section:
        of = self._seconds
        shares = {
            "save": Spread.of([dd / save for dd, save in zip(of["dd"], of["save"], strict=True)]),
            "load": Spread.of([load / cat for load, cat in zip(of["load"], of["cat"], strict=True)]),
            "checksums": Spread.of([part / save for part, save in zip(of["checksums"], of["save"], strict=True)]),
        }
        with_s, without_s = self._steps["steps with"], self._steps["steps without"]
        slower = Spread.of([statistics.mean(w) / statistics.mean(wo) for w, wo in zip(with_s, without_s, strict=True)])
        steps_s = [step for block in with_s for step in block]
        longest = max(steps_s) / statistics.median(steps_s)
        beside_mib = _BOUND_MIB + (self._run.held_beside_bytes >> 20)
        rows = [
            self._row("dd", of["dd"], None),
            self._row("save", of["save"], shares["save"]),
            self._row("checksums", of["checksums"], shares["checksums"]),
            self._row("cat", of["cat"], None),
            self._row("load", of["load"], shares["load"]),
            self._row("steps without", [step for block in without_s for step in block], None, per_disk=False),
            self._row("steps with", steps_s, slower, per_disk=False),
        ]
        return Section(
            f"Checkpoints of a table of {size_text(self._bytes)}, all rows touched",
            rows,
            [
                Measure("a save reaches of dd's rate", shares["save"].median, _OF_DD, at_least=True),
                Measure("a load takes of cat's time", shares["load"].median, _OF_CAT),
                Measure("checksums take of a save", shares["checksums"].median, _CHECKSUMS),
                Measure("mean step with saves, of one without", slower.median, _MEAN),
                Measure("longest step with saves, of their median", longest, _LONGEST),
                Measure("memory of a save, MiB", self._peaks["save"] / 2**20, _BOUND_MIB),
                Measure("memory of a load, MiB", self._peaks["load"] / 2**20, _BOUND_MIB),
                Measure("memory of a save beside steps, MiB", self._peaks["steps with"] / 2**20, beside_mib),
            ],
            self._notes(len(with_s[0])),
        )

    def _row(self, name: str, seconds: list[float], share: Spread | None, *, per_disk: bool = True) -> dict[str, Cell]:
        peak = self._peaks.get(name)
        return {
            "what": name,
            "seconds": Spread.of(seconds),
            "mb_per_second": self._bytes / 1e6 / statistics.median(seconds) if per_disk else None,
            "ratio": share,
            "to": _COMPARED.get(name),
            "peak_mib": None if peak is None else peak / 2**20,
        }

    def _notes(self, count: int) -> list[str]:
        options = self._options
        waited = {name: self._queued_s[name] / sum(map(sum, blocks)) for name, blocks in self._steps.items()}
        return [
            f"{options.rounds} rounds in turns, whoever begins one coming later in the next; median (10th to 90th "
            "percentile); ratios compare round by round",
            f"dd writes zeros in blocks of {size_text(PIECE_BYTES)}, the pieces of a save, and syncs the file; files "
            "are dropped from the page cache before they are read; checksums: of the same pieces, alone",
            f"steps: {options.workload.lookups:,} lookups and {options.compute_ms:g} ms of matrix products on the same "
            f"thread; {count} a block, which lasts twice as long as dd; a save begins with the first step of a block",
            "share of its time that the loop waited for a core, which others had: "
            + ", ".join(f"{name} {share:.0%}" for name, share in sorted(waited.items())),
            "peak: memory of the process beyond what it held before, page cache left out; of a save beside steps, the "
            "undo log and all that those steps allocate are counted",
        ]
