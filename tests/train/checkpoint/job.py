"""A small engine and small tables on real ranks, saved and loaded by the run's own `Checkpoints`."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from offload.config import OffloadConfig
from tests.command_line import JOB
from tests.offload.tables_job import Job, open_tables, train_step
from tests.train.reference import Toy
from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.content import Now
from train.checkpoint.identity import Identity
from train.checkpoint.together import Failed
from train.config.deepspeed import DeepSpeedConfig
from train.config.job import JobConfig
from train.errors import UserError
from train.optim.optimizer import OptimizerConfig

Live = dict[tuple[str, int], bytes]
"""What a rank holds, bit by bit: of the backbone by tensor and element, of the tables by "row" and id."""


def identity(**data: Any) -> Identity:
    return Identity({"size": 1}, {"primes": [[97], [61]]}, {"fingerprint": "f", "seed": 0} | data, "sha")


@dataclass
class Parts:
    """An engine, tables and their checkpoints on this rank."""

    engine: Any
    tables: Any
    checkpoints: Checkpoints

    @classmethod
    def open(
        cls,
        folder: Path,
        stage: int,
        *,
        config: dict[str, Any] | None = None,
        offload: OffloadConfig | None = None,
        local: bool = False,
        **data: Any,
    ) -> "Parts":
        from train.engine import Engine

        sections = {
            "run": {"name": "x", "local_checkpoints": local},
            "checkpoint": config or {},
            "data": {"path": "x", "allow_change": bool(data)},
        }
        section = {"stage": stage, "stage3_param_persistence_threshold": 20, "sub_group_size": 100}
        engine = Engine(
            Toy(dist.get_rank()),
            optimizer=OptimizerConfig(adam_parameters=["*embed*", "*gate.*"]),
            deepspeed_config=DeepSpeedConfig.model_validate({"zero_optimization": section}),
        )
        tables = open_tables(Job(), offload or OffloadConfig(window_rows=60, depth=1))
        return cls(engine, tables, Checkpoints(folder, JobConfig.model_validate(JOB | sections), identity(**data)))

    def fill(self, seed: int) -> None:
        """Gives every element of the backbone's state another value."""
        torch.manual_seed(100 * seed + dist.get_rank())
        for piece in self.engine.state_pieces(64):
            piece.values.copy_(torch.randn(len(piece.values)))
        self.engine.steps = seed

    def train(self, steps: range) -> None:
        for step in steps:
            train_step(self.tables, Job(), step)

    def live(self) -> Live:
        found = {}
        for tensor, start, values in self.engine.state_pieces(64):
            found |= {(tensor, start + n): value.numpy().tobytes() for n, value in enumerate(values.clone().split(1))}
        for ids, records, counts in self.tables.with_counts(self.tables.updated_rows()):
            found |= {
                ("row", row): record.numpy().tobytes() + bytes([count])
                for row, record, count in zip(ids.tolist(), records, counts.tolist(), strict=True)
            }
        return found

    def close(self) -> None:
        self.tables.close()
        self.engine.close()


def save_steps(folder: Path, stage: int, steps: list[int]) -> list[Live]:
    """Saves after each of some steps; returns what this rank held then."""
    parts, done, seen = Parts.open(folder, stage), 0, []
    for step in steps:
        parts.train(range(done, step))
        parts.fill(step)
        parts.checkpoints.save(step, Now(parts.engine, parts.tables))
        seen.append(parts.live())
        done = step
    parts.close()
    return seen


def load_all(folders: list[Path], stages: list[int]) -> list[tuple[int, Live, list[str]]]:
    """Resumes from each folder at each stage; returns the step, what this rank then held, and the notes."""
    found = []
    for folder in folders:
        for stage in stages:
            parts = Parts.open(folder, stage)
            resumed = parts.checkpoints.resume(parts.engine, parts.tables)
            found.append((resumed.step, parts.live(), resumed.notes))
            parts.close()
    return found


def messages(folder: Path, act: Callable[[Parts, int], Any], **options: Any) -> list[str]:
    """What an action on this rank raises."""
    parts = Parts.open(folder, 1, **options)
    try:
        result = act(parts, dist.get_rank())
        return [f"nothing: {result}"]
    except (UserError, Failed) as error:
        return [str(error)]
    finally:
        parts.close()


def with_full_disk(act: Callable[[], Any]) -> Any:
    """Runs `act` on a disk that is full as soon as tensors are written."""
    import train.checkpoint.direct as module

    def write(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        def __getattr__(self, name: str) -> Any:
            return write if name == "write" else getattr(os, name)

    module.os = Full()  # type: ignore[assignment]
    try:
        return act()
    finally:
        module.os = os
