"""How much memory a save and a load take beyond what is held before: a real process, a table with all rows touched."""

import threading
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from offload.config import OffloadConfig
from offload.rows.records import RowInit
from offload.tables import EngramTables
from tests.command_line import JOB
from tests.train.checkpoint.job import identity
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.content import Now
from train.config.deepspeed import DeepSpeedConfig
from train.config.job import JobConfig
from train.optim.optimizer import OptimizerConfig

DIM = 80


class Addresses:
    """One module of so many rows."""

    num_modules = 1

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def num_rows(self, module: int) -> int:
        return self._rows


class Peak:
    """The most memory that is this process's own: neither files nor what was there before."""

    def __enter__(self) -> Self:
        self._before, self.bytes, self._done = own_memory(), 0, False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._done:
            self.bytes = max(self.bytes, own_memory() - self._before)
            time.sleep(0.001)


def own_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def open_parts(folder: Path, rows: int, width: int) -> tuple[Any, EngramTables, Checkpoints]:
    from train.engine import Engine

    engine = Engine(
        nn.Sequential(nn.Linear(width, width, bias=False)),
        optimizer=OptimizerConfig(name="adamw"),
        deepspeed_config=DeepSpeedConfig.model_validate({"zero_optimization": {"stage": 2}}),
    )
    addresses: Any = Addresses(rows)
    tables = EngramTables(
        OffloadConfig(window_rows=1000, host_touch=True),
        addresses,
        dim=DIM,
        init=RowInit(0, 0.02),
        batches=lambda step: [],
        num_steps=0,
    )
    config = JobConfig.model_validate(JOB | {"run": {"name": "x"}, "data": {"path": "x"}})
    of_run = identity()
    of_run.addresses.update(primes=[[rows]])  # type: ignore[union-attr]
    return engine, tables, Checkpoints(folder, config, of_run)


def touch_all(tables: EngramTables, rows: int) -> None:
    state = tables.optimizer_state()
    tables.load_optimizer_state(state | {"learning_rates": [0.1]})
    for ids in torch.arange(rows).split(10_000):
        tables.load_rows(ids, records(ids, tables.record_bytes // 4))


def records(ids: Tensor, words: int) -> Tensor:
    made = (ids[:, None] * 3 + torch.arange(words)).float()
    made.view(torch.int32)[:, -1] = 1
    return made


def measure(action: str, folder: Path, rows: int, width: int) -> tuple[int, int]:
    """Saves or loads on this rank; returns the bytes of the checkpoint, and the most memory that it took."""
    engine, tables, checkpoints = open_parts(folder, rows, width)
    # Compiling takes memory, too, once for all saves and loads: not what is asked here.
    touch_all(tables, 1)
    list(tables.updated_rows())
    if action == "save":
        touch_all(tables, rows)
    with Peak() as peak:
        if action == "save":
            checkpoints.save(1, Now(engine, tables))
        else:
            assert checkpoints.resume(engine, tables).step == 1
    if action == "load":
        for (ids, found), _ in zip(tables.updated_rows(), range(3), strict=False):
            assert torch.equal(found, records(ids, tables.record_bytes // 4))
    return sum(path.stat().st_size for path in folder.glob("step-*/*")), peak.bytes
