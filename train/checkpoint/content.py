"""What a save writes: the state of a run, as it is or as it stays while steps go on."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any, NamedTuple

from offload.tables import EngramTables
from train.checkpoint.host_copies import HostCopies
from train.checkpoint.identity import Identity
from train.checkpoint.index import Save, Written
from train.checkpoint.manifest import Base, Manifest
from train.checkpoint.parts import PIECE_BYTES
from train.checkpoint.saves import Content
from train.checkpoint.tensor_files import CODES
from train.config.job import JobConfig
from train.engine import Engine

_PROGRAMS = ("engram-pretrain", "torch", "deepspeed")


class Now(NamedTuple):
    """The state of a run, as it is.

    Attributes:
        engine: the backbone.
        tables: None without Engram.
        skipped_in_a_row: how many of the last steps changed nothing.
        recent, unevaluated, tokens: come back in `Resumed`.
    """

    engine: Engine
    tables: EngramTables | None
    skipped_in_a_row: int = 0
    recent: Sequence[tuple[float, float]] = ()
    unevaluated: bool = False
    tokens: int = 0


class Contents:
    """The contents of the saves of one run.

    Args:
        job: its resolved config.
        identity: of this run.
        hosts: by rank, the node that keeps its parts; empty if all ranks share a disk.

    Attributes:
        data_changes: see `Manifest`.
    """

    def __init__(self, job: JobConfig, identity: Identity, hosts: Sequence[str]) -> None:
        self._identity, self._hosts, self._undo_bytes = identity, hosts, job.checkpoint.undo_bytes
        self._job = job.model_dump(mode="json")
        self._backbone = HostCopies()
        self.data_changes: list[dict[str, Any]] = []

    def of(self, step: int, now: Now, base: Base | None, since: int, *, beside: bool, ephemeral: bool) -> Content:
        """What a save after `step` steps writes.

        Args:
            step: steps that were done.
            now: the state.
            base: the full save that it adds to; None if it is one.
            since: rows without an update after this one are left out.
            beside: whether it stays as it is now while steps go on.
            ephemeral: see `Manifest`.
        """
        engine, tables = now.engine, now.tables
        tensors = {name: (CODES[info.dtype], list(info.shape)) for name, info in engine.state_tensors().items()}
        of_step: dict[str, Any] = {
            "step": step,
            "steps_applied": engine.steps,
            "skipped_in_a_row": now.skipped_in_a_row,
            "ephemeral": ephemeral,
            "recent": list(now.recent),
            "unevaluated": now.unevaluated,
            "tokens": now.tokens,
            "tables": tables.optimizer_state() if tables else None,
            "base": base,
        }

        def describe(save: Save, written: Sequence[Written]) -> Manifest:
            return Manifest(
                nonce=save.nonce,
                world_size=save.world_size,
                **of_step,
                **vars(self._identity),
                data_changes=self.data_changes,
                tensors=tensors,
                ranks=list(written),
                nodes=list(self._hosts),
                config=self._job,
                versions={name: importlib.metadata.version(name) for name in _PROGRAMS},
            )

        updates, pieces = tables.updates if tables else 0, engine.state_pieces(PIECE_BYTES)
        if not beside:
            rows = tables.with_counts(tables.updated_rows(PIECE_BYTES, since=since)) if tables else ()
            return Content(step, updates, base, pieces, rows, describe)
        if tables is None:
            return Content(step, updates, base, self._backbone.copied(pieces), (), describe)
        frozen = tables.freeze(since=since, undo_bytes=self._undo_bytes)
        rows = tables.with_counts(frozen.pieces(PIECE_BYTES), frozen=True)
        return Content(step, updates, base, self._backbone.copied(pieces), rows, describe, frozen.close)
