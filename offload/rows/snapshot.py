"""The rows of a shard as they were at one moment, read piece by piece while steps go on and change them.

Nothing is copied beforehand. Whoever is about to change records says so first (`preserve`); those not read yet are then
copied to an undo log. Updates increase versions, so a record's version alone tells whether it is still that of the
moment, and which rows were updated since an earlier one.

Shape suffixes: R rows of the shard, N rows of a piece, W words of a record.
"""

from collections import defaultdict
from collections.abc import Iterator
from threading import Condition
from typing import NamedTuple

import torch
from torch import Tensor

from offload.host.file_records import FileRecords
from offload.rows.shard import Shard

_PART_ROWS = 1 << 18
"""Rows whose versions are checked together, and whose entries in the log are released together."""
_ID_BYTES = 8
_LAST_VERSION = (1 << 31) - 1


class _Entry(NamedTuple):
    """Rows (places in the shard, int64 [N], ascending), and their records before they were changed."""

    rows_N: Tensor
    records_NW: Tensor


class Snapshot:
    """One thread reads it, once; another one may change records meanwhile, if it calls `preserve` first.

    Args:
        records_RW: all the shard's records, on any device or in a file, with every update.
        shard: the rows.
        since: rows without an update after this one are left out.
        last: the last update that was applied; None if no later one comes while the snapshot is read.
        undo_bytes: the most bytes of records in the log.
    """

    def __init__(
        self,
        records_RW: Tensor | FileRecords,
        shard: Shard,
        *,
        since: int = 0,
        last: int | None = None,
        undo_bytes: int = 0,
    ) -> None:
        self._records_RW, self._shard = records_RW, shard
        self._since, self._last, self._undo_bytes = since, _LAST_VERSION if last is None else last, undo_bytes
        self._log: dict[int, list[_Entry]] = defaultdict(list)
        self._held_bytes = 0
        self._next = 0  # rows before it were read
        self._progress = Condition()

    def preserve(self, rows: Tensor) -> None:
        """Called before records of these rows (places in the shard, int64) change. Waits while the log is full."""
        versions = self._versions_of(rows)
        changing = rows[(versions > self._since) & (versions <= self._last)].sort().values
        _, counts = (changing // _PART_ROWS).unique_consecutive(return_counts=True)
        for of_part in changing.split(counts.tolist()):
            self._keep(of_part)

    def pieces(self, piece_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows that were ever updated, and after `since`.

        Args:
            piece_bytes: the most bytes of ids and records together.

        Returns:
            Pieces, each of one module: job-wide row ids (int64 [N]) and records (fp32 [N, W]), ascending.
        """
        sharding, rank = self._shard.sharding, self._shard.rank
        most = max(1, piece_bytes // (self._shard.layout.bytes + _ID_BYTES))
        for module in range(len(sharding.num_rows)):
            start = sharding.shard_offset(module, rank)
            for rows in self._rows(start, start + len(sharding.owned(module, rank)), most):
                yield sharding.global_ids(rank, rows), self._read(rows)

    def close(self) -> None:
        """Ends the snapshot, read or not: nothing is preserved any more, and nobody waits."""
        self._advance(len(self._records_RW))

    def _keep(self, rows: Tensor) -> None:
        """Logs those rows of one part that are still to be read."""
        nbytes = len(rows) * self._shard.layout.bytes
        last = int(rows[-1])
        with self._progress:
            # Reading goes on whatever training does, and passes these rows in the end: nobody waits for ever.
            self._progress.wait_for(lambda: self._next > last or self._held_bytes + nbytes <= self._undo_bytes)
            if self._next > last:
                return
            records_NW = self._copy(rows)
            self._log[last // _PART_ROWS].append(_Entry(rows, records_NW))
            self._held_bytes += nbytes

    def _rows(self, start: int, end: int, most: int) -> Iterator[Tensor]:
        """The snapshot's rows in a range of the shard, up to `most` at a time."""
        waiting = torch.empty(0, dtype=torch.int64)
        while start < end:
            stop = min(end, (start // _PART_ROWS + 1) * _PART_ROWS)
            waiting = torch.cat([waiting, self._rows_of_part(start, stop)])
            whole = len(waiting) - len(waiting) % most
            yield from waiting[:whole].split(most) if whole else ()
            waiting, start = waiting[whole:], stop
        if len(waiting):
            yield waiting

    def _rows_of_part(self, start: int, stop: int) -> Tensor:
        versions = self._shard.layout.versions(self._records_RW, start, stop)
        there = (versions > self._since) & (versions <= self._last)
        # After the versions: what had changed when they were read is in the log by now.
        with self._progress:
            for entry in self._log.get(start // _PART_ROWS, ()):
                there[entry.rows_N[(entry.rows_N >= start) & (entry.rows_N < stop)] - start] = True
        return there.nonzero().flatten() + start

    def _read(self, rows: Tensor) -> Tensor:
        first, last = int(rows[0]), int(rows[-1])
        if last - first == len(rows) - 1 and isinstance(self._records_RW, Tensor):  # no row between them is left out
            records_NW = self._records_RW[first : last + 1].to("cpu", copy=True)
        else:
            records_NW = self._copy(rows)
        with self._progress:
            # What changed while it was copied is in the log: it was preserved before.
            for part in range(first // _PART_ROWS, last // _PART_ROWS + 1):
                # A row may be there twice, the second time while its write-back was under way: the first one counts.
                for entry in reversed(self._log.get(part, [])):
                    _put_back(entry, rows, records_NW)
            self._advance(last + 1)
        return records_NW

    def _versions_of(self, rows: Tensor) -> Tensor:
        if isinstance(self._records_RW, FileRecords):
            return self._shard.layout.version(self._copy(rows))
        return self._shard.layout.version(self._records_RW)[rows.to(self._records_RW.device)].cpu()

    def _copy(self, rows: Tensor) -> Tensor:
        return self._records_RW.index_select(0, rows.to(self._records_RW.device)).cpu()

    def _advance(self, following: int) -> None:
        with self._progress:
            self._next = following
            for part in [part for part in self._log if (part + 1) * _PART_ROWS <= following or self._all_read]:
                self._held_bytes -= sum(len(entry.rows_N) for entry in self._log.pop(part)) * self._shard.layout.bytes
            self._progress.notify_all()

    @property
    def _all_read(self) -> bool:
        return self._next >= len(self._records_RW)


def _put_back(entry: _Entry, rows: Tensor, records_NW: Tensor) -> None:
    """Overwrites the records of those of the rows that an entry has."""
    low, high = torch.searchsorted(entry.rows_N, torch.stack([rows[0], rows[-1] + 1])).tolist()
    indices = torch.searchsorted(rows, entry.rows_N[low:high])
    found = rows[indices] == entry.rows_N[low:high]
    records_NW[indices[found]] = entry.records_NW[low:high][found]
