"""Checkpoints: everything a run needs to continue with the same bits.

A checkpoint is one folder, `checkpoints/step-00000100/`:

    state.json                          step, what the run was (model, addresses, data), table optimizer, file list
    backbone.safetensors                fp32 master weights, optimizer tensors and buffers, by parameter name
    tables-00000-of-00002.safetensors   of each rank: the rows it owned that were ever updated, with their ids

Nothing in it depends on the number of ranks or the ZeRO stage. The folder is written under another name and renamed
when all ranks are done, so a folder with this name is complete. Checksums of the files are a later matter.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from offload.tables import EngramTables
from train.checkpoint.files import (
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
from train.checkpoint.identity import FORMAT_VERSION, Identity
from train.engine import Engine, EngineState
from train.errors import UserError
from train.files import publish

_NAME = re.compile(r"step-\d{8,}")


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
        return next(reversed(complete_checkpoints(self.folder)), None)

    def count(self) -> int:
        """How many complete checkpoints there are."""
        return len(complete_checkpoints(self.folder))

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
            return _load(path, engine, tables, self._identity.same_run)
        except Damaged as error:
            raise UserError(f"{path}: {error}; {self._way_out(path)}") from None

    def begin_with(self, path: Path, engine: Engine, tables: EngramTables | None) -> None:
        """Loads the checkpoint of another run, to begin a new phase with it at step 0. Collective.

        Raises:
            UserError: it is damaged, or its weights or rows mean something else in this run.
        """
        try:
            _load(path, engine, tables, self._identity.same_weights)
        except Damaged as error:
            raise UserError(f"checkpoint.init_from: {path}: {error}; give another checkpoint") from None

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
            for path in complete_checkpoints(self.folder)[: -self._keep]:
                shutil.rmtree(path)

    def _describe(self, step: int, state: EngineState, tables: EngramTables | None) -> dict[str, Any]:
        ranks = dist.get_world_size()
        return {
            "format": FORMAT_VERSION,
            "step": step,
            "steps_applied": state.steps,
            **vars(self._identity),
            "tables": tables.optimizer_state() if tables else None,
            "table_files": [tables_file(rank, ranks) for rank in range(ranks)] if tables else [],
        }

    def _way_out(self, path: Path) -> str:
        others = [other for other in complete_checkpoints(self.folder) if other != path]
        return f"delete {path} to go on from {others[-1]}" if others else f"delete {path} to start anew"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by step; none if there is no such folder."""
    folders = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in folders if _NAME.fullmatch(path.name) and (path / STATE_FILE).exists()]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(source: str) -> Path:
    """The checkpoint that `source` (`checkpoint.init_from`) is, or the newest one of the run whose folder it is.

    Raises:
        UserError: there is none.
    """
    if (Path(source) / STATE_FILE).exists():
        return Path(source)
    if found := complete_checkpoints(Path(source) / "checkpoints"):
        return found[-1]
    raise UserError(f"checkpoint.init_from: {source} is no checkpoint, and no run's folder with one in it")


def _load(path: Path, engine: Engine, tables: EngramTables | None, check: Callable[[dict[str, Any]], None]) -> int:
    """Loads a checkpoint whose description passes `check`; returns its steps. Raises Damaged, UserError."""
    try:
        description = read_state(path)
        check(description)
        engine.load_state(load_backbone(path, description["steps_applied"]))
        if tables is not None:
            tables.load_optimizer_state(description["tables"])
            for name in description["table_files"]:
                load_tables(tables, path / name)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return int(description["step"])
