"""Checkpoints: everything a run needs to continue with the same bits.

A checkpoint is one folder, `checkpoints/step-00000100/`:

    state.json                          step, what the run was (model, addresses, data), table optimizer, file list
    backbone.safetensors                fp32 master weights, optimizer tensors and buffers, by parameter name
    tables-00000-of-00002.safetensors   of each rank: the rows it owned that were ever updated, with their ids

Nothing in it depends on the number of ranks or the ZeRO stage. The folder is written under another name and renamed
when all ranks are done, so a folder with this name is complete. Checksums of the files are a later matter.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import ValidationError

from model.config import ModelConfig
from offload.tables import EngramTables
from train.checkpoint_files import (
    STATE_FILE,
    Damaged,
    load_backbone,
    load_tables,
    read_state,
    save_backbone,
    save_tables,
    tables_file,
    write_state,
)
from train.engine import Engine, EngineState
from train.errors import UserError
from train.files import publish

FORMAT_VERSION = 1
_NAME = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Identity:
    """What a checkpoint must agree on with the run that goes on from it.

    Attributes:
        model: the `model` section.
        addresses: fingerprint of the row addresses; None without Engram.
        data: all that the global batches depend on.
    """

    model: dict[str, Any]
    addresses: dict[str, Any] | None
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they live; made when the first is saved. What else a user keeps there is left alone.
        keep: how many of the newest stay.
        identity: of this run.
    """

    def __init__(self, folder: Path, *, keep: int, identity: Identity) -> None:
        self.folder, self._keep, self._identity = folder, keep, identity

    def newest(self) -> Path | None:
        """The complete checkpoint with the highest step."""
        return next(reversed(self._complete()), None)

    def count(self) -> int:
        """How many complete checkpoints there are."""
        return len(self._complete())

    def save(self, step: int, engine: Engine, tables: EngramTables | None) -> Path:
        """Saves the state after `step` steps. Collective.

        Raises:
            OSError: the disk is full or cannot be written; nothing half-written is left.
        """
        target = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{target.name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        try:
            self._write(partial, target, step, engine, tables)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        dist.barrier()
        return target

    def load(self, path: Path, engine: Engine, tables: EngramTables | None) -> int:
        """Loads a checkpoint and returns the steps it has. Collective.

        Raises:
            UserError: it is damaged, another model's, of another data order, or its table addresses differ.
        """
        try:
            description = read_state(path)
            self._check(path, description)
            engine.load_state(load_backbone(path, description["steps_applied"]))
            if tables is not None:
                tables.updater.load_state(description["tables"])
                for name in description["table_files"]:
                    load_tables(tables, path / name)
        except Damaged as error:
            raise UserError(f"{path}: {error}; {self._way_out(path)}") from None
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return int(description["step"])

    def _complete(self) -> list[Path]:
        folders = self.folder.iterdir() if self.folder.is_dir() else ()
        named = [path for path in folders if _NAME.fullmatch(path.name) and (path / STATE_FILE).exists()]
        return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))

    def _write(self, partial: Path, target: Path, step: int, engine: Engine, tables: EngramTables | None) -> None:
        state = engine.state()
        if state is not None:
            save_backbone(partial, state)
        if tables is not None:
            save_tables(tables, partial / tables_file(dist.get_rank(), dist.get_world_size()))
        dist.barrier()
        if state is not None:
            write_state(partial, self._describe(step, state, tables))
            publish(partial, target)
            for path in self._complete()[: -self._keep]:
                shutil.rmtree(path)

    def _describe(self, step: int, state: EngineState, tables: EngramTables | None) -> dict[str, Any]:
        ranks = dist.get_world_size()
        return {
            "format": FORMAT_VERSION,
            "step": step,
            "steps_applied": state.steps,
            **vars(self._identity),
            "tables": tables.updater.state() if tables else None,
            "table_files": [tables_file(rank, ranks) for rank in range(ranks)] if tables else [],
        }

    def _check(self, path: Path, saved: dict[str, Any]) -> None:
        if saved["format"] != FORMAT_VERSION:
            raise UserError(f"{path}: has format {saved['format']}, this version reads {FORMAT_VERSION}")
        for key, current in vars(self._identity).items():
            value = _with_defaults(saved[key]) if key == "model" else saved[key]
            if (where := _difference(value, current, key)) is not None:
                raise UserError(
                    f"{path}: saved with another {where}; restore that setting, or start anew under another run.name"
                )

    def _way_out(self, path: Path) -> str:
        others = [other for other in self._complete() if other != path]
        return f"delete {path} to go on from {others[-1]}" if others else f"delete {path} to start anew"


def _with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """A saved model section with the keys that were added since, at their defaults."""
    try:
        return ModelConfig.model_validate(model).model_dump(mode="json")
    except ValidationError:
        return model


def _difference(saved: Any, current: Any, key: str) -> str | None:
    """The first key at which two JSON-able values differ, with both values."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in {**saved, **current}:
            if (where := _difference(saved.get(name), current.get(name), f"{key}.{name}")) is not None:
                return where
        return None
    return None if saved == current else f"{key} ({_shortened(saved)}, now {_shortened(current)})"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
