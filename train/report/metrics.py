"""The numbers of a run: one record per logged step, in `metrics.jsonl`, and for Weights & Biases and TensorBoard."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from train.config.report import WandbConfig
from train.files import new_file
from train.report.tensorboard_log import TensorBoardLog
from train.report.wandb_log import WandbLog

__all__ = ["METRICS_FILE", "MetricsLog", "OffloadMetrics", "StepMetrics", "read_metrics"]

METRICS_FILE = "metrics.jsonl"
"""Name of the file in a run's folder."""


@dataclass(frozen=True)
class OffloadMetrics:
    """What the tables cost a step, over all Engram modules and ranks."""

    stall_ms: float
    """Time that the step waited for rows, in milliseconds; the slowest rank's."""
    plan_ms: float
    """Time that the planner's thread worked for the step, in milliseconds; the busiest rank's."""
    fetch_rows: int
    """Rows fetched from host memory; those that were never updated are drawn instead, and cross no bus."""
    hit_rate: float
    """Share of the step's unique rows that were already in the window, 0 to 1."""
    writeback_rows: int
    """Rows written back to host memory."""


@dataclass(frozen=True)
class StepMetrics:
    """What is known after a step, the same on every rank."""

    step: int
    """Steps done, this one included: the first is 1."""
    loss: float
    """Mean cross-entropy of the step's tokens, in nats."""
    grad_norm: float
    """Norm of the raw gradient, backbone and tables together, before clipping."""
    lr: float
    """Learning rate that the backbone's optimizer used."""
    tokens: int
    """Tokens trained on since the start of the run."""
    step_ms: float
    """Time of the step, in milliseconds; the mean over the steps since the last record."""
    tokens_per_s: float
    """Tokens per second over all ranks, since the last record."""
    offload: OffloadMetrics | None = None
    """None for a model without Engram."""
    val_loss: float | None = None
    """Mean cross-entropy of the validation split, in nats, if this step was followed by an evaluation."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """More numbers, by their names in the record."""

    def record(self) -> dict[str, float]:
        """The flat form that is written: `step`, `loss`, ..., `offload.stall_ms`, ...; what is None is left out."""
        flat = {
            name: value
            for name, value in vars(self).items()
            if value is not None and name not in ("offload", "extra", "val_loss")
        }
        if self.offload is not None:
            flat |= {f"offload.{name}": value for name, value in vars(self.offload).items()}
        if self.val_loss is not None:
            flat["val_loss"] = self.val_loss
        return flat | dict(self.extra)


class MetricsLog:
    """Appends records to `folder/metrics.jsonl`, one JSON object per line, and mirrors them where that is wanted.

    Floats are written with all their digits (Python's shortest form that reads back to the same bits; not-a-number
    and infinity as `NaN` and `Infinity`). A run that resumes from `resumed_step` drops the records of later steps
    first, so the file always tells one history; `every` says how many steps a record is for. Use it on one rank only,
    as a context manager.

    Raises:
        OSError: the folder is missing, not writable or full.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resumed_step: int = 0,
        every: int = 1,
        wandb: WandbConfig | None = None,
        tensorboard: bool = False,
        name: str = "",
        job: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = Path(folder) / METRICS_FILE
        self.notes = _lost(self._path, resumed_step, every)
        """What is missing of the records of earlier steps, in lines to show."""
        truncate(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._mirrors: list[WandbLog | TensorBoardLog] = [
            WandbLog(wandb or WandbConfig(), Path(folder), name=name, job=job or {})
        ]
        if tensorboard:
            self._mirrors.append(TensorBoardLog(Path(folder), resumed_step=resumed_step))

    def log(self, metrics: StepMetrics) -> None:
        """Writes one record; it is in the file when this returns."""
        record = metrics.record()
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._mirror(record)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Adds numbers to the record of a step, if there is one."""
        self._file.close()
        records = [record | values if record["step"] == step else record for record in read_metrics(self._path)]
        _replace(self._path, records)
        self._file = self._path.open("a", encoding="utf-8")
        self._mirror({"step": step, **values})

    def _mirror(self, record: Mapping[str, float]) -> None:
        for mirror in self._mirrors:
            mirror.log(record)

    def close(self, exit_code: int = 0) -> None:
        """Ends all; `exit_code` other than 0 marks the run as failed in Weights & Biases."""
        self._file.close()
        for mirror in self._mirrors:
            mirror.close(exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(exit_code=0 if kind is None else 1)


def read_metrics(path: str | os.PathLike[str], last_bytes: int | None = None) -> list[dict[str, float]]:
    """The records of a `metrics.jsonl`, oldest first; what is not one, such as a line cut off by a crash, is left out.

    Those within the file's `last_bytes` alone, if it is given.

    Raises:
        OSError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        if last_bytes is not None:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last_bytes))
        lines = file.read().splitlines()
    return [record for line in lines if (record := _record(line))]


def _lost(path: Path, resumed_step: int, every: int) -> list[str]:
    """What a resume has to tell of records that are not there, of which there should be one `every` so many steps."""
    if not path.exists():
        return [f"{path} is not there: it begins after step {resumed_step}"] if resumed_step else []
    records = [_record(line) for line in path.read_bytes().splitlines()]
    broken = [number for number, record in enumerate(records, 1) if record is None]
    newest = max((step for record in records if record and (step := int(record["step"])) <= resumed_step), default=0)
    found = []
    if broken:
        found.append(f"{path}: {len(broken)} line(s) are no records and are dropped, the first is line {broken[0]}")
    if resumed_step - newest >= every:
        found.append(f"{path}: there is no record of the steps from {newest + 1} to {resumed_step}")
    return found


def _record(line: bytes) -> dict[str, float] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def truncate(path: Path, last_step: int) -> None:
    """Leaves only whole records up to `last_step` in a file of records; it is replaced as a whole."""
    if not path.exists():
        return
    _replace(path, [record for record in read_metrics(path) if record["step"] <= last_step])


def _replace(path: Path, records: list[dict[str, float]]) -> None:
    with new_file(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
