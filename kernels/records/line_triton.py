"""Records that each start a line of host memory, copied line by line: see `kernels.records.triton` for the others.

Beside a model's kernels a copy gets few of an SM's issue slots, so a kilobyte must take few instructions: accesses are
masked by column alone, and only if a record's words are not a power of two, and each thread looks up few numbers. The
last tile is filled up with the last row, whose words are written again.

W words of a record, U rows to move.
"""

import triton
import triton.language as tl

PIECE = tl.constexpr(128)
"""Words of a record that a warp moves at a time, 16 bytes per thread."""


@triton.jit(do_not_specialize=["rows", "slots", "num_rows"])
def _fetch_lines(
    host: tl.tensor,
    rows: tl.tensor,
    window: tl.tensor,
    slots: tl.tensor,
    num_rows: tl.int32,
    WORDS: tl.constexpr,
    HOST_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        there = _pieces(host, rows, start, num_rows, HOST_STRIDE, WIDTH, ROWS)
        records = tl.load(there, mask=_inside(WORDS, WIDTH), eviction_policy="evict_first")
        here = _pieces(window, slots, start, num_rows, WINDOW_STRIDE, WIDTH, ROWS)
        tl.store(here, records, mask=_inside(WORDS, WIDTH))


@triton.jit(do_not_specialize=["rows", "slots", "num_rows"])
def _write_lines(
    host: tl.tensor,
    rows: tl.tensor,
    window: tl.tensor,
    slots: tl.tensor,
    num_rows: tl.int32,
    WORDS: tl.constexpr,
    HOST_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    for start in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        here = _pieces(window, slots, start, num_rows, WINDOW_STRIDE, WIDTH, ROWS)
        records = tl.load(here, mask=_inside(WORDS, WIDTH))
        there = _pieces(host, rows, start, num_rows, HOST_STRIDE, WIDTH, ROWS)
        tl.store(there, records, mask=_inside(WORDS, WIDTH), cache_modifier=".cs")


@triton.jit
def _pieces(
    records: tl.tensor,
    places: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Where the words of a tile's records are: [ROWS, pieces, words of a piece].

    In this order, warps divide up the rows, and a thread has all pieces of a row, whose number it looks up once.
    """
    place = tl.load(places + tl.minimum(start + tl.arange(0, ROWS), count - 1)).to(tl.int64)
    return (records + place * STRIDE)[:, None, None] + _columns(WIDTH)


@triton.jit
def _inside(WORDS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    return _columns(WIDTH) < WORDS


@triton.jit
def _columns(WIDTH: tl.constexpr) -> tl.tensor:
    PART: tl.constexpr = min(WIDTH, PIECE)
    return tl.arange(0, WIDTH // PART)[None, :, None] * PART + tl.arange(0, PART)[None, None, :]
