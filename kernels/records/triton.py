"""Copies whole row records straight over the bus between pinned host memory and window, by a few persistent programs.

A read over the bus takes a microsecond or more, so some fifty kilobytes must be in flight at any time: each program has
tiles of rows in flight while it stores another one. Data travels in requests of at most one 128-byte line: each row's
tile starts where a line of *host* memory starts, with the words before the record masked, so that no request of a warp
is split between two lines. The window's side may be unaligned: its memory is 50 times faster. Where each record starts
a line, as padded ones do, `kernels.records.line_triton` takes a tenth of the instructions.

A program leaves most of its SM to others: it holds a bounded amount in registers, and little else.

R rows of the shard, C slots, U rows to move, W words of a record.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.records.line_triton import _fetch_lines, _write_lines

_LINE = 32  # words

TILE_WORDS = 2048
STAGES = 5
"""Depth of the loops' software pipeline: three tiles and as many tiles' row numbers in flight while one is stored."""
WARPS = 4
REGISTERS = 96
"""The most that a thread may use. Left alone, the compiler takes more, or spills although some are still free."""
_MOST_WARPS = 16  # whose registers an SM has, with some to spare


def fetch_records(
    host_RW: Tensor, rows_U: Tensor, window_CW: Tensor, slots_U: Tensor, *, padded: bool = False, programs: int
) -> None:
    """See `kernels.records.fetch_records`."""
    if not len(rows_U):
        return
    _launch((_fetch, _fetch_lines), host_RW, rows_U, window_CW, slots_U, padded, programs)


def write_records(
    window_CW: Tensor, slots_U: Tensor, host_RW: Tensor, rows_U: Tensor, *, padded: bool = False, programs: int
) -> None:
    """See `kernels.records.write_records`."""
    if not len(rows_U):
        return
    _launch((_write, _write_lines), host_RW, rows_U, window_CW, slots_U, padded, programs)


def _launch(
    kernels: Sequence[Any],
    host_RW: Tensor,
    rows_U: Tensor,
    window_CW: Tensor,
    slots_U: Tensor,
    padded: bool,
    programs: int,
) -> None:
    """Launches the first of the kernels, or the second where every record starts a line of host memory."""
    constants = _tile_constants(host_RW, window_CW, padded)
    kernel = kernels["ALIGNMENT" not in constants]
    grid = (min(programs, triton.cdiv(len(rows_U), constants["ROWS"])),)
    with torch.cuda.device_of(window_CW):
        kernel[grid](host_RW.view(torch.int32), rows_U, window_CW.view(torch.int32), slots_U, len(rows_U), **constants)


def _tile_constants(host_RW: Tensor, window_CW: Tensor, padded: bool) -> dict[str, int]:
    # They follow from the table alone: its kernels are compiled once, whatever is moved.
    stride = host_RW.stride(0)
    words = stride if padded else host_RW.shape[1]
    first_word = host_RW.data_ptr() // 4 % _LINE
    alignment = math.gcd(stride, first_word, _LINE)
    width = triton.next_power_of_2(words + _LINE - alignment)
    rows = max(1, TILE_WORDS // width)
    return {
        "WORDS": words,
        "HOST_STRIDE": stride,
        "WINDOW_STRIDE": window_CW.stride(0),
        **({} if alignment == _LINE else {"FIRST_WORD": first_word, "ALIGNMENT": alignment}),
        "WIDTH": width,
        "ROWS": rows,
        # A single row that is larger than a tile is enough in flight by itself.
        "STAGES": STAGES if width <= TILE_WORDS else 1,
        "num_warps": min(_MOST_WARPS, WARPS * triton.cdiv(width, TILE_WORDS)),
        "maxnreg": REGISTERS,
    }


@triton.jit(do_not_specialize=["rows", "slots", "num_rows"])
def _fetch(
    host: tl.tensor,
    rows: tl.tensor,
    window: tl.tensor,
    slots: tl.tensor,
    num_rows: tl.int32,
    WORDS: tl.constexpr,
    HOST_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    columns = tl.arange(0, WIDTH)[None, :]
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        line, skipped = _lines(rows, start, num_rows, HOST_STRIDE, FIRST_WORD, ALIGNMENT, WIDTH, ROWS, "evict_last")
        inside = _inside(columns, skipped, WORDS)
        records = tl.load((host + line)[:, None] + columns, mask=inside, other=0, eviction_policy="evict_first")
        _, skipped = _lines(rows, start, num_rows, HOST_STRIDE, FIRST_WORD, ALIGNMENT, WIDTH, ROWS, "")
        place = _numbers(slots, start, num_rows, ROWS, "") * WINDOW_STRIDE - skipped
        tl.store((window + place)[:, None] + columns, records, mask=_inside(columns, skipped, WORDS))


@triton.jit(do_not_specialize=["rows", "slots", "num_rows"])
def _write(
    host: tl.tensor,
    rows: tl.tensor,
    window: tl.tensor,
    slots: tl.tensor,
    num_rows: tl.int32,
    WORDS: tl.constexpr,
    HOST_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    columns = tl.arange(0, WIDTH)[None, :]
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        _, skipped = _lines(rows, start, num_rows, HOST_STRIDE, FIRST_WORD, ALIGNMENT, WIDTH, ROWS, "evict_last")
        place = _numbers(slots, start, num_rows, ROWS, "") * WINDOW_STRIDE - skipped
        inside = _inside(columns, skipped, WORDS)
        records = tl.load((window + place)[:, None] + columns, mask=inside, other=0)
        line, skipped = _lines(rows, start, num_rows, HOST_STRIDE, FIRST_WORD, ALIGNMENT, WIDTH, ROWS, "")
        inside = _inside(columns, skipped, WORDS)
        tl.store((host + line)[:, None] + columns, records, mask=inside, cache_modifier=".cs")


@triton.jit
def _lines(
    rows: tl.tensor,
    start: tl.tensor,
    num_rows: tl.tensor,
    HOST_STRIDE: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    POLICY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the lines in which the tile's records start begin, in words, and how many of their words to skip.

    Where there is no row, all of a tile's words are skipped. A tile's rows are looked up once to load it and again to
    store it, which must differ in POLICY: otherwise the compiler would merge the two and keep lines and masks of all
    tiles in flight in registers.
    """
    word = _numbers(rows, start, num_rows, ROWS, POLICY) * HOST_STRIDE + FIRST_WORD
    live = start + tl.arange(0, ROWS) < num_rows
    skipped = tl.multiple_of(tl.where(live, word.to(tl.int32) & 31, WIDTH), ALIGNMENT)
    return (word >> 5) * 32 - FIRST_WORD, skipped


@triton.jit
def _numbers(
    numbers: tl.tensor, start: tl.tensor, count: tl.tensor, ROWS: tl.constexpr, POLICY: tl.constexpr
) -> tl.tensor:
    places = start + tl.arange(0, ROWS)
    return tl.load(numbers + places, mask=places < count, other=0, eviction_policy=POLICY).to(tl.int64)


@triton.jit
def _inside(columns: tl.tensor, skipped: tl.tensor, WORDS: tl.constexpr) -> tl.tensor:
    words = columns - skipped[:, None]
    return (words >= 0) & (words < WORDS)
