"""The sizes of a job's Engram tables: rows, and bytes in host memory and in the windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from model.config import EngramConfig
from offload.addresses.hashing import choose_primes
from offload.config import OffloadConfig, RowDtype
from offload.optimizers import OPTIMIZERS
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout

GPU = torch.device("cuda")
"""What jobs of a size worth planning run on; on a CPU records lie side by side."""
_DTYPES: tuple[RowDtype, ...] = get_args(RowDtype)


@dataclass(frozen=True)
class Table:
    """The table of one Engram layer.

    Attributes:
        layer: counted from 0.
        rows: of all heads.
        parameters: weights of all rows.
        heads: rows of each head's part, by n-gram order.
    """

    layer: int
    rows: int
    parameters: int
    heads: dict[int, list[int]]


@dataclass(frozen=True)
class HostMemory:
    """What the records of all rows take for a run on GPUs, once every row has been touched.

    Attributes:
        optimizers: those whose records are of this size.
        row_dtype: of the weights in a record.
        state_dtype: of the optimizer state in a record.
        record_bytes: weights, optimizer state and version of one row.
        padded_bytes: that they take in memory.
        bytes: of all tables, padding included.
        bytes_per_rank: of the largest rank's shard.
        chosen: whether these are the job's settings.
    """

    optimizers: list[str]
    row_dtype: RowDtype
    state_dtype: RowDtype
    record_bytes: int
    padded_bytes: int
    bytes: int
    bytes_per_rank: int
    chosen: bool


@dataclass(frozen=True)
class Window:
    """What a rank keeps on its device.

    Attributes:
        mode: of `offload`; `resident` keeps the whole shard there.
        rows_per_rank: slots.
        bytes_per_rank: of their records, padded as for a GPU.
    """

    mode: str
    rows_per_rank: int
    bytes_per_rank: int


def count_tables(engram: EngramConfig) -> list[Table]:
    """The tables of a model. Needs no tokenizer: it decides where rows are, not how many there are."""
    primes = choose_primes(len(engram.layers), [engram.rows_per_head] * len(engram.orders), engram.heads)
    return [
        Table(layer, sum(rows), sum(rows) * engram.row_dim, dict(_by_order(engram, rows)))
        for layer, rows in zip(engram.layers, primes, strict=True)
    ]


def host_memory(tables: list[Table], engram: EngramConfig, offload: OffloadConfig, ranks: int) -> list[HostMemory]:
    """What the tables take in host memory under each optimizer, row dtype and state dtype there is."""
    rows, shard_rows = sum(table.rows for table in tables), largest_shard(tables, ranks)
    found = []
    for (state_size, state_dtype), optimizers in _by_state(engram.row_dim).items():
        for row_dtype in _DTYPES:
            layout = RecordLayout(engram.row_dim, state_size, row_dtype, state_dtype)
            dtypes = row_dtype, state_dtype
            chosen = (offload.row_dtype, offload.optimizer.state_dtype) == dtypes
            padded = layout.stride_bytes(GPU)
            found.append(
                HostMemory(
                    optimizers,
                    *dtypes,
                    record_bytes=layout.bytes,
                    padded_bytes=padded,
                    bytes=rows * padded,
                    bytes_per_rank=shard_rows * padded,
                    chosen=chosen and offload.optimizer.type in optimizers,
                )
            )
    return found


def window(tables: list[Table], engram: EngramConfig, offload: OffloadConfig, ranks: int) -> Window:
    """What the window, or the resident shard, takes on each rank's device."""
    slots = largest_shard(tables, ranks)
    if offload.mode == "window":
        slots = min(offload.window_rows, slots)
    layout = RecordLayout.of(engram.row_dim, offload.optimizer, offload.row_dtype)
    return Window(offload.mode, slots, slots * layout.stride_bytes(GPU))


def _by_state(dim: int) -> dict[tuple[int, RowDtype], list[str]]:
    """The optimizers by how many numbers of state they keep per row, and the dtypes of these."""
    found: dict[tuple[int, RowDtype], list[str]] = {}
    for name, optimizer in OPTIMIZERS.items():
        for dtype in optimizer.state_dtypes:
            found.setdefault((optimizer.state_size(dim), dtype), []).append(name)
    return found


def _by_order(engram: EngramConfig, rows: list[int]) -> Iterator[tuple[int, list[int]]]:
    for place, order in enumerate(engram.orders):
        yield order, rows[place * engram.heads : (place + 1) * engram.heads]


def largest_shard(tables: list[Table], ranks: int) -> int:
    """Rows of the largest shard: of each table, ranges differ by at most one row."""
    sharding = Sharding(tuple(table.rows for table in tables), ranks)
    return max(sharding.shard_rows(rank) for rank in {0, ranks // 2, ranks - 1, *range(min(ranks, 256))})
