"""The record of a row: weights, optimizer state and version, side by side in one row of 32-bit words.

A record is what travels: one contiguous piece of memory holds all that an update needs. Weights and state are fp32 or
bf16; updates work on records unpacked to fp32 and pack what they rounded. Version 0 marks a row that
was never updated; its weights are not stored but drawn from (seed, row id), so that a table needs no start-up pass.

Shape suffixes: U rows, D columns of a row's weights, S numbers of optimizer state, W words of a
record, X words of the same record unpacked to fp32.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kernels.records.row_init import initial_rows
from offload.config import RowDtype, TableOptimizerConfig
from offload.host.file_records import FileRecords
from offload.optimizers import OPTIMIZERS

_LINE, _SECTOR = 32, 8
"""Words that a GPU moves at a time: lines of 128 bytes, over the bus and in its caches, and the sectors of these."""
_MOST_PADDING = 1 / 8
"""The most memory that whole lines may cost, as a share of a record's words."""

_DTYPES: dict[RowDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def torch_dtype(name: RowDtype) -> torch.dtype:
    """The dtype that a config names."""
    return _DTYPES[name]


def padded_words(words: int, device: torch.device) -> int:
    """How far apart records of `words` words lie in host memory and in the window, in words.

    A GPU writes a part of a line over the bus at a quarter of the rate of whole ones, and copies whole ones with a
    tenth of the instructions. So records fill lines where that takes up to an eighth more memory, and otherwise
    sectors. On a CPU nothing is gained by it: records lie side by side.

    Args:
        words: of a record (W).
        device: of the window.
    """
    if device.type == "cpu":
        return words
    in_lines = _round_up(words, _LINE)
    return in_lines if in_lines - words <= _MOST_PADDING * words else _round_up(words, _SECTOR)


def _words(numbers: int, dtype: RowDtype) -> int:
    return numbers if dtype == "fp32" else (numbers + 1) // 2


def _round_up(words: int, unit: int) -> int:
    return (words + unit - 1) // unit * unit


@dataclass(frozen=True)
class RecordLayout:
    """Where the parts of a record are.

    Args:
        dim: columns of a row's weights (D).
        state_size: numbers of optimizer state (S).
        row_dtype: of the weights. Two bf16 weights share a word; the last half of an odd row's last word stays 0.
        state_dtype: of the optimizer state, in the same way.
    """

    dim: int
    state_size: int
    row_dtype: RowDtype = "fp32"
    state_dtype: RowDtype = "fp32"

    @classmethod
    def of(cls, dim: int, optimizer: TableOptimizerConfig, row_dtype: RowDtype = "fp32") -> "RecordLayout":
        """The layout for rows of `dim` columns under this optimizer."""
        return cls(dim, OPTIMIZERS[optimizer.type].state_size(dim), row_dtype, optimizer.state_dtype)

    @property
    def weight_words(self) -> int:
        """Words of the weights."""
        return _words(self.dim, self.row_dtype)

    @property
    def state_words(self) -> int:
        """Words of the optimizer state."""
        return _words(self.state_size, self.state_dtype)

    @property
    def packed(self) -> bool:
        """Whether a part of the record is bf16, which every update rounds."""
        return "bf16" in (self.row_dtype, self.state_dtype)

    @property
    def words(self) -> int:
        """Words of a record: weights, state and one word of version (W)."""
        return self.weight_words + self.state_words + 1

    @property
    def bytes(self) -> int:
        """Bytes of a record."""
        return 4 * self.words

    def stride(self, device: torch.device) -> int:
        """Words from one record to the next in memory, for a window on this device: see `padded_words`."""
        return padded_words(self.words, device)

    def stride_bytes(self, device: torch.device) -> int:
        """Bytes of memory that a record takes, padding included."""
        return 4 * self.stride(device)

    @cached_property
    def unpacked(self) -> "RecordLayout":
        """The same record with fp32 weights and state."""
        return replace(self, row_dtype="fp32", state_dtype="fp32")

    def weights(self, records_UW: Tensor) -> Tensor:
        """View [U, D] of the weights, in the rows' dtype."""
        return records_UW[:, : self.weight_words].view(torch_dtype(self.row_dtype))[:, : self.dim]

    def state(self, records_UW: Tensor) -> Tensor:
        """View [U, S] of the optimizer state, in its dtype."""
        return records_UW[:, self.weight_words : -1].view(torch_dtype(self.state_dtype))[:, : self.state_size]

    def version(self, records_UW: Tensor) -> Tensor:
        """View int32 [U]: the number of the last update that was applied to the row, counted from 1; 0 for none."""
        return records_UW.view(torch.int32)[:, -1]

    def versions(self, records_RW: Tensor | FileRecords, start: int, stop: int) -> Tensor:
        """The versions of some of a shard's rows, in memory or in a file: int32, on the host."""
        if isinstance(records_RW, FileRecords):
            return records_RW.versions(start, stop)
        return self.version(records_RW[start:stop]).cpu()

    def unpack(self, records_UW: Tensor, out_UX: Tensor | None = None) -> Tensor:
        """The records in fp32, laid out as `unpacked` says; the records themselves if they are."""
        if not self.packed and out_UX is None:
            return records_UW
        out_UX = records_UW.new_empty(len(records_UW), self.unpacked.words) if out_UX is None else out_UX
        for part in _PARTS:
            part(self.unpacked, out_UX).copy_(part(self, records_UW))
        return out_UX

    def pack(self, records_UX: Tensor, out_UW: Tensor | None = None) -> Tensor:
        """The inverse of `unpack`. Parts must hold values of their dtypes: others are rounded to nearest."""
        if not self.packed and out_UW is None:
            return records_UX
        out_UW = records_UX.new_empty(len(records_UX), self.words) if out_UW is None else out_UW
        # The last word of each part, whose last half may be unused.
        out_UW[:, self.weight_words - 1].zero_()
        out_UW[:, -2].zero_()
        for part in _PARTS:
            part(self, out_UW).copy_(part(self.unpacked, records_UX))
        return out_UW


_PARTS = RecordLayout.weights, RecordLayout.state, RecordLayout.version


@dataclass(frozen=True)
class RowInit:
    """How rows that were never updated get their values.

    Args:
        seed: of the table.
        std: standard deviation of the values.
    """

    seed: int
    std: float

    def fill(self, layout: RecordLayout, records_UW: Tensor, row_ids_U: Tensor) -> None:
        """Writes the initial weights of the rows (job-wide ids, int64) whose version is 0, rounded to nearest."""
        fresh = (layout.version(records_UW) == 0).nonzero().flatten()
        if fresh.numel():
            weights = layout.weights(records_UW)
            drawn = initial_rows(row_ids_U[fresh], layout.dim, seed=self.seed, std=self.std)
            weights.index_copy_(0, fresh, drawn.to(weights.dtype))
