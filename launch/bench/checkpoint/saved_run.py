"""One rank's tables, all rows touched, with a small backbone, as a run trains, saves and loads them."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from launch.bench.options import BenchOptions
from launch.bench.table_path import TablePath
from launch.bench.workload import DrawnSteps, Workload
from offload.plan.plan import Tokens
from train.checkpoint.checked import checksum
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.content import Now
from train.checkpoint.identity import Identity
from train.checkpoint.parts import PIECE_BYTES
from train.checkpoint.tensor_files import tensor_bytes
from train.config.deepspeed import DeepSpeedConfig
from train.config.job import JobConfig
from train.engine import Engine
from train.optim.optimizer import OptimizerConfig

_WIDTH = 512
_DRAWN = 16
_FILLED_ROWS = 1 << 14
_PRODUCT, _TIMED_PRODUCTS = 256, 51


class SavedRun:
    """The state of a run, its steps and its checkpoints.

    Args:
        options: of the tables and their steps.
        folder: of the checkpoints.

    Attributes:
        checkpoints: of the run.

    Raises:
        Unavailable: host memory does not suffice.
    """

    def __init__(self, options: BenchOptions, folder: Path) -> None:
        drawn = _Cycle(options.workload)
        compute = _Compute(options.compute_ms)
        self._folder, self._rows, self._steps = folder, drawn.num_rows(0), 0
        self._path = TablePath("", drawn, options.offload(drawn), drawn.workload.gradient(), compute)
        self._tables = self._path.tables
        self._engine = Engine(
            nn.Sequential(nn.Linear(_WIDTH, _WIDTH, bias=False)),
            optimizer=OptimizerConfig(name="adamw"),
            deepspeed_config=DeepSpeedConfig(),
        )
        config = {"run": {"name": "bench"}, "model": {"vocab_size": 2}, "data": {"path": "none"}, "train": {"steps": 1}}
        self._job = JobConfig.model_validate(config)
        self._touch_all()
        self.checkpoints = self._open_checkpoints()

    @property
    def now(self) -> Now:
        """What is saved."""
        return Now(self._engine, self._tables)

    @property
    def held_beside_bytes(self) -> int:
        """What a save beside steps may hold: states of the backbone, an undo log, and a count of each row."""
        return 3 * 4 * _WIDTH**2 + self._job.checkpoint.undo_bytes + self._rows

    def step(self) -> None:
        """Trains a step."""
        self._path.step(self._steps)
        self._steps += 1

    def load(self) -> None:
        """Loads the newest checkpoint, as a run that begins does. Before the first step."""
        self._open_checkpoints().resume(self._engine, self._tables)

    def checksums_s(self) -> float:
        """Seconds in which the rows' checksums are made, of the pieces that a save writes and as it gathers them."""
        seconds = 0.0
        for piece in self._tables.with_counts(self._tables.updated_rows(PIECE_BYTES)):
            started = time.perf_counter()
            for part in piece:
                checksum(tensor_bytes(part))
            seconds += time.perf_counter() - started
        return seconds

    def close(self) -> None:
        """Ends the background work and frees the tables."""
        self._path.close()
        self._engine.close()

    def _open_checkpoints(self) -> Checkpoints:
        return Checkpoints(self._folder, self._job, Identity({}, {"primes": [[self._rows]]}, {}, "none"))

    def _touch_all(self) -> None:
        self._tables.load_optimizer_state(self._tables.optimizer_state() | {"learning_rates": [1e-3]})
        for ids in torch.arange(self._rows).split(_FILLED_ROWS):
            records = torch.rand(len(ids), self._tables.record_bytes // 4)
            records.view(torch.int32)[:, -1] = 1
            self._tables.load_rows(ids, records)


class _Cycle(DrawnSteps):
    """A few drawn steps, again and again: how many are taken depends on the disk."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, _DRAWN)
        self.steps = 1 << 40

    def batches(self, step: int) -> list[Tokens]:
        """See `DrawnSteps.batches`."""
        return super().batches(step % _DRAWN)


class _Compute:
    """Stands for the model: as many products of matrices, on this thread, as take `milliseconds` undisturbed."""

    def __init__(self, milliseconds: float) -> None:
        self._left, self._right = (torch.randn(_PRODUCT, _PRODUCT) for _ in range(2))
        self._products = 1
        each_s = statistics.median(self._timed() for _ in range(_TIMED_PRODUCTS))
        self._products = round(1e-3 * milliseconds / each_s)

    def __call__(self) -> None:
        for _ in range(self._products):
            torch.mm(self._left, self._right)

    def _timed(self) -> float:
        started = time.perf_counter()
        self()
        return time.perf_counter() - started


def files_of(folder: Path) -> Sequence[Path]:
    """The files of all checkpoints in a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]
