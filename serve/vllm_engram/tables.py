"""The rows of an export's tables: memory-mapped files, read for a whole batch at a time beside the model.

Shape suffixes: T tokens, S sub-tables, E memory width (S x columns of a row).
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class Table:
    """One module's rows.

    Args:
        files: safetensors files of one tensor each, in the order of the rows.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.parts = [_mapped(file) for file in files]
        self.starts = torch.tensor([0, *(len(part) for part in self.parts)]).cumsum(0)

    @torch.inference_mode()
    def __call__(self, rows_TS: Tensor) -> Tensor:
        """The values [T, E] of rows (int64 [T, S], on the CPU)."""
        rows = rows_TS.flatten()
        if len(self.parts) == 1:
            return self.parts[0][rows].view(len(rows_TS), -1)
        values = self.parts[0].new_empty(len(rows), self.parts[0].shape[1])
        part_of = torch.bucketize(rows, self.starts, right=True) - 1
        for number in part_of.unique().tolist():
            here = part_of == number
            values[here] = self.parts[number][rows[here] - self.starts[number]]
        return values.view(len(rows_TS), -1)


def _mapped(file: Path) -> Tensor:
    """Pages of the file are read when they are first used, and can be dropped again."""
    with safe_open(file, framework="pt") as opened:
        (name,) = opened.keys()
        return opened.get_tensor(name)


class Tables:
    """All modules' tables, and the thread that reads them."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tables
        self._thread = ThreadPoolExecutor(1, "engram-rows")

    def fetch(self, rows: Sequence[Tensor]) -> list[Future[Tensor]]:
        """Begins to read the rows [T, S] of each module, the first layer's first.

        The values [T, E] come on the CPU.
        """
        return [self._thread.submit(table, rows_TS.cpu()) for table, rows_TS in zip(self._tables, rows, strict=True)]
