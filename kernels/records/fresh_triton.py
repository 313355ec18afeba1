"""Records of rows that were never updated, drawn in the window: nothing crosses the bus.

C slots, U rows, W words of a record, M modules.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.records.draws import draw_key, draw_scale
from kernels.records.row_init_triton import draw_initial
from kernels.rows.stochastic_rounding_triton import round_to_nearest

_ROWS = 4
_COLUMNS = 128  # words at most


def draw_records(
    window_CW: Tensor,
    slots_U: Tensor,
    rows_U: Tensor,
    *,
    id_ranges_M2: Tensor,
    dim: int,
    row_dtype: torch.dtype,
    seed: int,
    std: float,
) -> None:
    """See `kernels.records.draw_records`."""
    if not len(rows_U):
        return
    bf16 = row_dtype == torch.bfloat16
    weight_words = triton.cdiv(dim, 2) if bf16 else dim
    words = window_CW.shape[1]
    columns = min(_COLUMNS, triton.next_power_of_2(words))
    with torch.cuda.device_of(window_CW):
        _draw_fresh[(triton.cdiv(len(slots_U), _ROWS), triton.cdiv(words, columns))](
            window_CW.view(torch.int32),
            slots_U,
            rows_U,
            len(slots_U),
            id_ranges_M2,
            draw_key(seed),
            draw_scale(std),
            MODULES=len(id_ranges_M2),
            DIM=dim,
            BF16=bf16,
            WEIGHT_WORDS=weight_words,
            WORDS=words,
            WINDOW_STRIDE=window_CW.stride(0),
            ROWS=_ROWS,
            COLUMNS=columns,
            num_warps=4,
        )


@triton.jit(do_not_specialize=["slots", "rows", "num_rows", "key"])
def _draw_fresh(
    window: tl.tensor,
    slots: tl.tensor,
    rows: tl.tensor,
    num_rows: tl.int32,
    id_ranges: tl.tensor,
    key: tl.uint64,
    scale: tl.float32,
    MODULES: tl.constexpr,
    DIM: tl.constexpr,
    BF16: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = places < num_rows
    records = window + tl.load(slots + places, mask=live, other=0).to(tl.int64) * WINDOW_STRIDE
    first = tl.program_id(1) * COLUMNS
    words = (first + tl.arange(0, COLUMNS))[None, :]
    inside = live[:, None] & (words < WORDS)
    if first < WEIGHT_WORDS:
        row = tl.load(rows + places, mask=live, other=0).to(tl.int64)
        drawn = _initial_words(_job_wide_ids(row, id_ranges, MODULES)[:, None], words, key, scale, DIM, BF16)
        tl.store(records[:, None] + words, tl.where(words < WEIGHT_WORDS, drawn, 0), mask=inside)
    else:
        tl.store(records[:, None] + words, 0, mask=inside)


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
