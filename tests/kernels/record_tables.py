"""Small tables of records of random bits."""

import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SEED, STD = 11, 0.02
_MAP_NORESERVE = 0x4000  # Linux; Python has a name for it since 3.13


@dataclass(frozen=True)
class RecordShape:
    """Columns, words of state, and how the records lie in memory: words between two, and before the first."""

    dim: int
    state: int
    row_dtype: torch.dtype = torch.float32
    apart: int = 0
    before: int = 0
    padded: bool = False
    """Whether the words between two may be copied too."""

    @property
    def weight_words(self) -> int:
        return self.dim if self.row_dtype == torch.float32 else (self.dim + 1) // 2

    @property
    def words(self) -> int:
        return self.weight_words + self.state + 1

    @property
    def initial(self) -> dict[str, Any]:
        """What drawn records depend on."""
        return {"dim": self.dim, "row_dtype": self.row_dtype, "seed": SEED, "std": STD}


def random_records(shape: RecordShape, num_rows: int, *, seed: int, fresh: float = 0.5, pinned: bool = False) -> Tensor:
    """fp32 [num_rows, words] of random bits, NaNs among them; some of the rows all zero, as if never updated."""
    generator = torch.Generator().manual_seed(seed)
    pitch = shape.words + shape.apart
    words = torch.randint(-(2**31), 2**31, (shape.before + num_rows * pitch,), generator=generator, dtype=torch.int32)
    # torch pins at a page's start; elsewhere a line's start is all that decides on what runs.
    words = words.pin_memory() if pinned else _at_a_line(words)
    records = words[shape.before :].view(num_rows, pitch)[:, : shape.words]
    records[:, -1].bitwise_or_(1)
    records[torch.rand(num_rows, generator=generator) < fresh] = 0
    return records.view(torch.float32)


def table_at_a_line(shape: RecordShape, num_rows: int) -> Tensor:
    """fp32 zeros [num_rows, words] whose first record starts a line, as pinned memory does."""
    pitch = shape.words + shape.apart
    return _at_a_line(torch.zeros(num_rows * pitch)).view(num_rows, pitch)[:, : shape.words]


def _at_a_line(words: Tensor) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, words.nbytes), dtype=words.dtype).copy_(words)


def sparse_words(count: int) -> Tensor:
    """fp32 zeros that take no memory before they are written."""
    memory = mmap.mmap(-1, 4 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=torch.float32)
