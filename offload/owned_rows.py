"""A rank's rows between two steps: how they are saved, and loaded before the first.

Shape suffixes: N rows, D columns of a row, W words of a record.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from offload.rows.records import RowInit
from offload.rows.shard import Shard
from offload.rows.snapshot import Snapshot
from offload.step import RankShard


class OwnedRows:
    """The rows that this rank owns.

    Args:
        shard: this rank's.
        init: the rows' values before their first update.
    """

    def __init__(self, shard: RankShard, init: RowInit) -> None:
        self._shard, self._init = shard, init

    @property
    def num_parameters(self) -> int:
        """Weights of all rows of all ranks."""
        return sum(self._shard.sharding.num_rows) * self._shard.layout.dim

    @property
    def record_bytes(self) -> int:
        """Bytes of a row's record, as it is saved."""
        return self._shard.layout.bytes

    @property
    def updates(self) -> int:
        """Updates applied so far, including those of the checkpoint that the run began with."""
        return self._shard.updater.applied

    def updated_rows(self, piece_bytes: int = 4 << 20, *, since: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows that were ever updated, straight from where they are: at most one piece is copied.

        Args:
            piece_bytes: the most bytes of ids and records together.
            since: rows without an update after this one are left out.

        Returns:
            Pieces, each of one module: job-wide row ids (int64 [n]) and records (fp32 [n, W]), ascending. To be
            consumed before the next step.
        """
        return self._snapshot(since=since).pieces(piece_bytes)

    def with_counts(
        self, rows: Iterable[tuple[Tensor, Tensor]], *, frozen: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some of this rank's rows, with how often each was updated (uint8 [n], 255 for more).

        Args:
            rows: pieces of ids and records.
            frozen: give the counts as they are now, copied: a byte for each row of the shard. Otherwise none may change
                while rows are consumed.
        """
        counts_R = self._shard.store.update_counts()
        counts_R = counts_R.cpu().clone() if frozen else counts_R
        return self._counted(rows, counts_R)

    def _counted(
        self, rows: Iterable[tuple[Tensor, Tensor]], counts_R: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for ids, records in rows:
            # A piece is of one module: all its rows are as far from their ids as the first.
            first, _ = self._shard.sharding.to_places(self._shard.rank, ids[:1])
            yield ids, records, counts_R[(ids + (first - ids[:1])).to(counts_R.device)].cpu()

    def freeze(self, *, since: int = 0, undo_bytes: int) -> Snapshot:
        """The same rows as they are now, to be read by another thread while steps go on.

        Waits until dirty slots are written to host memory. Later steps copy the records that they are about to
        overwrite there, unless they were already read, and wait when these copies reach `undo_bytes`. There is one such
        snapshot at a time: it must be closed before the next.
        """
        snapshot = self._snapshot(since=since, last=self.updates, undo_bytes=undo_bytes)
        self._shard.store.before_change = snapshot.preserve
        return snapshot

    def owned_rows(self) -> list[range]:
        """The job-wide ids of this rank's rows, module by module."""
        sharding, rank = self._shard.sharding, self._shard.rank
        owned = [sharding.owned(module, rank) for module in range(len(sharding.num_rows))]
        bases = [sum(sharding.num_rows[:module]) for module in range(len(sharding.num_rows))]
        return [range(base + rows.start, base + rows.stop) for base, rows in zip(bases, owned, strict=True)]

    def load_rows(self, row_ids: Tensor, records: Tensor, counts: Tensor | None = None) -> int:
        """Loads those of the given rows that this rank owns, before the first step; returns how many these are.

        Args:
            row_ids: int64 [n], job-wide.
            records: fp32 [n, W].
            counts: uint8 [n], how often each was updated; where that is unknown, once for all that ever were.
        """
        shard = self._shard
        places, mine = shard.sharding.to_places(shard.rank, row_ids)
        # Never 0 where there is a version: the row would be drawn anew.
        counted = torch.ones(len(row_ids), dtype=torch.uint8) if counts is None else counts.clamp(min=1)
        counted = torch.where(shard.layout.version(records) == 0, 0, counted)
        if len(places) < len(row_ids):
            records, counted = records[mine], counted[mine]
        shard.store.load(places, records, counted)
        shard.observer.loaded(places, records)
        return len(places)

    def begin_with_weights(self, *, there: bool) -> None:
        """Before `load_weights`: rows that are `there` count as updated once, by a step without a gradient or a rate.

        A row that was never updated would be drawn.
        """
        updater = self._shard.updater
        updater.load_state({**updater.state(), "learning_rates": [0.0] if there else []})

    def load_weights(self, row_ids: Tensor, weights_ND: Tensor) -> int:
        """Loads those of the given rows that this rank owns, without optimizer state; returns how many these are.

        Args:
            row_ids: int64 [N], job-wide.
            weights_ND: fp32 [N, D]; bf16 rows are rounded to nearest.
        """
        layout = self._shard.layout
        records_NW = torch.zeros(len(row_ids), layout.words)
        layout.weights(records_NW).copy_(weights_ND)
        layout.version(records_NW).fill_(1)
        return self.load_rows(row_ids, records_NW)

    def forget_rows(self) -> None:
        """Undoes `load_rows`: no row was ever updated."""
        for ids, records in self.updated_rows():
            records.zero_()
            self._init.fill(self._shard.layout, records, ids)
            self.load_rows(ids, records)

    def optimizer_state(self) -> dict[str, Any]:
        """What the rows' optimizer must know besides their records, as a JSON object; the same on every rank."""
        return self._shard.updater.state()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continues from `optimizer_state`, before the first step.

        Raises:
            ValueError: the state is of another optimizer.
        """
        self._shard.updater.load_state(state)

    def _snapshot(self, **options: Any) -> Snapshot:
        shard = self._shard
        records_RW = shard.store.flush()
        shard.observer.saved(records_RW)
        return Snapshot(records_RW, Shard(shard.sharding, shard.rank, shard.layout, self._init), **options)
