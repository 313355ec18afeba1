"""Checkpoints: everything a run needs to continue with the same bits.

A checkpoint is one folder, `checkpoints/step-00000100/`:

    state.json                      step, what the run was (model, addresses, data), table optimizer, file list
    backbone.safetensors            fp32 master weights, optimizer tensors and buffers, by parameter name
    tables-00000-of-00002.safetensors   of each rank: the rows it owned that were ever updated, with their ids

Nothing in it depends on the number of ranks or the ZeRO stage. The folder is written under another name and renamed
when all ranks are done, so a folder with this name is complete.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from offload.tables import EngramTables
from train.engine import Engine, EngineState
from train.errors import UserError

STATE_FILE = "state.json"
BACKBONE_FILE = "backbone.safetensors"
FORMAT_VERSION = 1
_PREFIX = "step-"


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
        folder: where they live; made when the first is saved.
        keep: how many of the newest stay.
        identity: of this run.
    """

    def __init__(self, folder: Path, *, keep: int, identity: Identity) -> None:
        self.folder, self._keep, self._identity = folder, keep, identity

    def newest(self) -> Path | None:
        """The complete checkpoint with the highest step."""
        found = sorted(self.folder.glob(f"{_PREFIX}*/{STATE_FILE}")) if self.folder.is_dir() else []
        return found[-1].parent if found else None

    def save(self, step: int, engine: Engine, tables: EngramTables | None) -> Path:
        """Saves the state after `step` steps. Collective.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        target = self.folder / f"{_PREFIX}{step:08d}"
        partial = self.folder / f".{target.name}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        state = engine.state()
        if state is not None:
            save_file(_flatten(state), partial / BACKBONE_FILE)
        if tables is not None:
            _save_tables(tables, partial / _tables_file(dist.get_rank(), dist.get_world_size()))
        dist.barrier()
        if state is not None:
            description = self._describe(step, state, tables)
            (partial / STATE_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            _publish(partial, target)
            self._prune()
        dist.barrier()
        return target

    def load(self, path: Path, engine: Engine, tables: EngramTables | None) -> int:
        """Loads a checkpoint and returns the steps it has. Collective.

        Raises:
            UserError: it is another model's, another data order's, or its table addresses differ.
        """
        description = _read_description(path)
        self._check(path, description)
        try:
            engine.load_state(_unflatten(description["steps_applied"], load_file(path / BACKBONE_FILE)))
            if tables is not None:
                tables.updater.load_state(description["tables"])
                for name in description["table_files"]:
                    _load_tables(tables, path / name)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        return int(description["step"])

    def _describe(self, step: int, state: EngineState, tables: EngramTables | None) -> dict[str, Any]:
        ranks = dist.get_world_size()
        return {
            "format": FORMAT_VERSION,
            "step": step,
            "steps_applied": state.steps,
            **vars(self._identity),
            "tables": tables.updater.state() if tables else None,
            "table_files": [_tables_file(rank, ranks) for rank in range(ranks)] if tables else [],
        }

    def _check(self, path: Path, saved: dict[str, Any]) -> None:
        for key, current in vars(self._identity).items():
            if (where := _difference(saved[key], current, key)) is not None:
                raise UserError(
                    f"{path}: saved with another {where}; restore that setting, or start anew under another run.name"
                )

    def _prune(self) -> None:
        for path in sorted(self.folder.glob(f"{_PREFIX}*"))[: -self._keep]:
            shutil.rmtree(path)


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


def _read_description(path: Path) -> dict[str, Any]:
    description = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if description["format"] != FORMAT_VERSION:
        raise UserError(f"{path}: format {description['format']}, this version reads {FORMAT_VERSION}")
    return dict(description)


def _tables_file(rank: int, ranks: int) -> str:
    return f"tables-{rank:05d}-of-{ranks:05d}.safetensors"


def _flatten(state: EngineState) -> dict[str, torch.Tensor]:
    tensors = {f"{slot}/{name}": value for name, slots in state.parameters.items() for slot, value in slots.items()}
    return tensors | {f"buffer/{name}": value.contiguous() for name, value in state.buffers.items()}


def _unflatten(steps: int, tensors: dict[str, torch.Tensor]) -> EngineState:
    state = EngineState(steps)
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        if slot == "buffer":
            state.buffers[name] = value
        else:
            state.parameters.setdefault(name, {})[slot] = value
    return state


def _save_tables(tables: EngramTables, path: Path) -> None:
    chunks: dict[str, torch.Tensor] = {}
    for number, (ids, records) in enumerate(tables.updated_rows()):
        chunks |= {f"ids.{number:06d}": ids, f"records.{number:06d}": records.contiguous()}
    save_file(chunks, path, metadata={"dim": str(tables.layout.dim), "state_words": str(tables.layout.state_words)})


def _load_tables(tables: EngramTables, path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        for key in sorted(name for name in file.keys() if name.startswith("ids.")):  # noqa: SIM118
            tables.load_rows(file.get_tensor(key), file.get_tensor(key.replace("ids.", "records.")))


def _publish(partial: Path, target: Path) -> None:
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
