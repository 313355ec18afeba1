"""Whole row records, straight over the bus between pinned host memory and the window, by a few persistent programs.

A read over the bus is answered after a microsecond or more, so that a hundred kilobytes must be on their way at any
time: each program has tiles of rows in flight while it stores another one. And it travels in requests of at most one
128-byte line: each row's tile starts where a line of *host* memory starts, with the words before the record masked, so
that no request of a warp is split between two lines. The window's side may be crooked: its memory is 50 times faster.

R rows of the shard, C slots, U rows to move, W words of a record, M modules.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.row_init import draw_key, draw_scale
from kernels.row_init_triton import draw_initial
from kernels.stochastic_rounding_triton import round_to_nearest

_LINE = 32  # words

_TILE_WORDS = 4096
_STAGES = 5
"""Of the loops' software pipeline: two to have the rows' numbers at hand, two for tiles on their way, one to store."""
_WARPS = 8


def fetch_records(
    host_RW: Tensor,
    rows_U: Tensor,
    window_CW: Tensor,
    slots_U: Tensor,
    *,
    id_ranges_M2: Tensor,
    dim: int,
    row_dtype: torch.dtype,
    seed: int,
    std: float,
    programs: int,
) -> None:
    """See `kernels.records.fetch_records`."""
    if not len(rows_U):
        return
    bf16 = row_dtype == torch.bfloat16
    weight_words = triton.cdiv(dim, 2) if bf16 else dim
    tile = _tile_constants(host_RW, window_CW)
    with torch.cuda.device_of(window_CW):
        _fetch[_grid(programs, len(rows_U), tile["ROWS"])](
            host_RW.view(torch.int32),
            rows_U,
            window_CW.view(torch.int32),
            slots_U,
            len(rows_U),
            id_ranges_M2,
            draw_key(seed),
            draw_scale(std),
            MODULES=len(id_ranges_M2),
            DIM=dim,
            BF16=bf16,
            WEIGHT_WORDS=weight_words,
            WEIGHT_WIDTH=triton.next_power_of_2(weight_words),
            **tile,
        )


def write_records(window_CW: Tensor, slots_U: Tensor, host_RW: Tensor, rows_U: Tensor, *, programs: int) -> None:
    """See `kernels.records.write_records`."""
    if not len(rows_U):
        return
    tile = _tile_constants(host_RW, window_CW)
    with torch.cuda.device_of(window_CW):
        _write[_grid(programs, len(rows_U), tile["ROWS"])](
            host_RW.view(torch.int32), rows_U, window_CW.view(torch.int32), slots_U, len(rows_U), **tile
        )


def _grid(programs: int, num_rows: int, tile_rows: int) -> tuple[int]:
    return (min(programs, triton.cdiv(num_rows, tile_rows)),)


def _tile_constants(host_RW: Tensor, window_CW: Tensor) -> dict[str, int]:
    # They follow from the table alone: its kernels are compiled once, whatever is moved.
    words, stride = host_RW.shape[1], host_RW.stride(0)
    first_word = host_RW.data_ptr() // 4 % _LINE
    alignment = math.gcd(stride, first_word, _LINE)
    width = triton.next_power_of_2(words + _LINE - alignment)
    rows = max(1, _TILE_WORDS // width)
    return {
        "WORDS": words,
        "HOST_STRIDE": stride,
        "WINDOW_STRIDE": window_CW.stride(0),
        "FIRST_WORD": first_word,
        "ALIGNMENT": alignment,
        "WIDTH": width,
        "ROWS": rows,
        # Four tiles of shared memory. A single row that is larger than that allows is enough on its way by itself.
        "STAGES": _STAGES if rows * width <= 2 * _TILE_WORDS else 1,
        "num_warps": _WARPS,
    }


@triton.jit(do_not_specialize=["rows", "slots", "num_rows", "key"])
def _fetch(
    host: tl.tensor,
    rows: tl.tensor,
    window: tl.tensor,
    slots: tl.tensor,
    num_rows: tl.int32,
    id_ranges: tl.tensor,
    key: tl.uint64,
    scale: tl.float32,
    MODULES: tl.constexpr,
    DIM: tl.constexpr,
    BF16: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    WEIGHT_WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    HOST_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    FIRST_WORD: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        live, row, host_places = _places(rows, start, num_rows, HOST_STRIDE, ROWS)
        _, _, window_places = _places(slots, start, num_rows, WINDOW_STRIDE, ROWS)
        words = _words_from_line_start(host_places, FIRST_WORD, ALIGNMENT, WIDTH)
        inside = live[:, None] & (words >= 0) & (words < WORDS)
        records = tl.load(host + (host_places[:, None] + words), mask=inside, other=0, eviction_policy="evict_first")
        version = tl.sum(tl.where(words == WORDS - 1, records, 0), axis=1)
        stored = inside & ((words >= WEIGHT_WORDS) | (version != 0)[:, None])
        tl.store(window + (window_places[:, None] + words), records, mask=stored)
        fresh = live & (version == 0)
        if tl.max(fresh.to(tl.int32), axis=0) != 0:
            weights = tl.arange(0, WEIGHT_WIDTH)[None, :]
            ids = _job_wide_ids(row, id_ranges, MODULES)[:, None]
            drawn = _initial_words(ids, weights, key, scale, DIM, BF16)
            filled = fresh[:, None] & (weights < WEIGHT_WORDS)
            tl.store(window + (window_places[:, None] + weights), drawn, mask=filled)


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
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        live, _, host_places = _places(rows, start, num_rows, HOST_STRIDE, ROWS)
        _, _, window_places = _places(slots, start, num_rows, WINDOW_STRIDE, ROWS)
        words = _words_from_line_start(host_places, FIRST_WORD, ALIGNMENT, WIDTH)
        inside = live[:, None] & (words >= 0) & (words < WORDS)
        records = tl.load(window + (window_places[:, None] + words), mask=inside, other=0)
        tl.store(host + (host_places[:, None] + words), records, mask=inside, cache_modifier=".cs")


@triton.jit
def _places(
    numbers: tl.tensor, start: tl.tensor, count: tl.tensor, STRIDE: tl.constexpr, ROWS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Which rows of the tile there are, their numbers, and where their records start, in words."""
    places = start + tl.arange(0, ROWS)
    live = places < count
    number = tl.load(numbers + places, mask=live, other=0).to(tl.int64)
    return live, number, number * STRIDE


@triton.jit
def _words_from_line_start(
    host_places: tl.tensor, FIRST_WORD: tl.constexpr, ALIGNMENT: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Words of the records [ROWS, WIDTH], the first of which starts a line of host memory: it may be before word 0."""
    skipped = tl.multiple_of(((host_places + FIRST_WORD) % 32).to(tl.int32), ALIGNMENT)
    return tl.arange(0, WIDTH)[None, :] - skipped[:, None]


@triton.jit
def _job_wide_ids(rows: tl.tensor, id_ranges: tl.tensor, MODULES: tl.constexpr) -> tl.tensor:
    ids = rows
    for module in tl.static_range(MODULES):
        first, shift = tl.load(id_ranges + 2 * module), tl.load(id_ranges + 2 * module + 1)
        ids = tl.where(rows >= first, rows + shift, ids)
    return ids


@triton.jit
def _initial_words(
    ids: tl.tensor, words: tl.tensor, key: tl.tensor, scale: tl.tensor, DIM: tl.constexpr, BF16: tl.constexpr
) -> tl.tensor:
    if BF16:
        low = round_to_nearest(draw_initial(ids, 2 * words, key, scale)).to(tl.uint32, bitcast=True)
        high = round_to_nearest(draw_initial(ids, 2 * words + 1, key, scale)).to(tl.uint32, bitcast=True)
        drawn = (low >> 16) | tl.where(2 * words + 1 < DIM, high, 0)
    else:
        drawn = draw_initial(ids, words, key, scale).to(tl.uint32, bitcast=True)
    return drawn.to(tl.int32, bitcast=True)
