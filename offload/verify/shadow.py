"""What a shard's records must be, kept independently, simply and synchronously, for verify mode.

Shape suffixes: U rows, W words of a record.
"""

import torch
from torch import Tensor

from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit

_NONE = -1


class VerifyError(RuntimeError):
    """What the tables hold differs from what was recomputed; one line tells where and what."""


def difference(what: str, row: str, part: str, found: object, expected: object) -> VerifyError:
    """The error that says that `part` of a row, as found at `what`, differs from what it must be."""
    return VerifyError(f"offload.verify: {what}: {row}: {part} is {found!r} and must be {expected!r}")


class Shadow:
    """The records of a rank's rows as their updates left them, in plain host memory.

    It takes as much memory as the records of all rows that were ever updated, twice that while it grows, and 4 bytes
    for each row of the shard.

    Args:
        layout, init: of the records.
        sharding, rank: which rows the shard holds.
    """

    def __init__(self, layout: RecordLayout, init: RowInit, sharding: Sharding, rank: int) -> None:
        self.layout, self._init, self._sharding, self._rank = layout, init, sharding, rank
        self._number_of = torch.full((sharding.shard_rows(rank),), _NONE, dtype=torch.int32)
        self._records = torch.zeros(0, layout.words)
        self._rows = torch.zeros(0, dtype=torch.int64)
        self.num_updated = 0
        """Rows that were ever updated."""

    def updated(self, start: int, end: int) -> Tensor:
        """Places (int64) of the rows that were the `start`-th to the `end`-th, exclusive, to get their first update."""
        return self._rows[start : min(end, self.num_updated)]

    def records(self, rows: Tensor) -> Tensor:
        """A copy [U, W] of the records of `rows` (places, int64), those that were never updated included."""
        numbers = self._number_of[rows].long()
        known = numbers != _NONE
        records = torch.zeros(len(rows), self.layout.words)
        records[known] = self._records[numbers[known]]
        self._init.fill(self.layout, records, self._sharding.global_ids(self._rank, rows))
        return records

    def put(self, rows: Tensor, records_UW: Tensor) -> None:
        """Stores the records of `rows` (places, int64, unique)."""
        fresh = rows[self._number_of[rows] == _NONE]
        self._grow(self.num_updated + len(fresh))
        self._number_of[fresh] = torch.arange(self.num_updated, self.num_updated + len(fresh), dtype=torch.int32)
        self._rows[self.num_updated : self.num_updated + len(fresh)] = fresh
        self.num_updated += len(fresh)
        self._records[self._number_of[rows].long()] = records_UW.cpu()

    def require(self, rows: Tensor, found_UW: Tensor, expected_UW: Tensor, what: str) -> None:
        """Compares records bit by bit, as they are stored or unpacked.

        Raises:
            VerifyError: at the first difference, naming row, owner and both values; `what` says where it was found.
        """
        differs_UW = found_UW.view(torch.int32) != expected_UW.to(found_UW.device).view(torch.int32)
        if not bool(differs_UW.any()):
            return
        # A wrong version explains wrong values, and says by how many steps a record is behind.
        shown_UW = differs_UW[:, -1:] if bool(differs_UW[:, -1].any()) else differs_UW
        row, word = shown_UW.nonzero()[0].tolist()
        word += differs_UW.shape[1] - shown_UW.shape[1]
        part, found, expected = self._part(word, differs_UW.shape[1]), found_UW[row], expected_UW[row]
        values = [record.view(torch.int32)[-1] if part == "version" else record[word] for record in (found, expected)]
        raise difference(what, self.row_name(rows[row]), part, *(value.item() for value in values))

    def row_name(self, place: Tensor) -> str:
        """A row and its owner, for a message."""
        row_id = int(self._sharding.global_ids(self._rank, place.cpu().reshape(1)))
        return f"row {row_id} (owner rank {self._rank})"

    def _part(self, word: int, words: int) -> str:
        if word == words - 1:
            return "version"
        layout = self.layout if words == self.layout.words else self.layout.unpacked
        if word < layout.weight_words:
            return f"weight {word}" if layout.row_dtype == "fp32" else f"word {word} of the bf16 weights"
        word -= layout.weight_words
        return f"state {word}" if layout.state_dtype == "fp32" else f"word {word} of the bf16 state"

    def _grow(self, wanted: int) -> None:
        if wanted <= len(self._rows):
            return
        size = min(max(wanted, 2 * len(self._rows)), len(self._number_of))
        for name in ("_records", "_rows"):
            old = getattr(self, name)
            grown = old.new_zeros(size, *old.shape[1:])
            grown[: len(old)] = old
            setattr(self, name, grown)
