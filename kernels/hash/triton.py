"""The n-gram hash as one Triton launch for all tokens, orders, heads and modules.

B batch, T sequence, S sub-tables (orders x heads), K multipliers (the largest order), L modules, V token ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.hash.spec import HashSpec

_ROWS_A_PROGRAM = 512
_WARPS = 4


def hash_ngrams_triton(
    tokens_BT: Tensor, positions_BT: Tensor, spec: HashSpec, compressed_V: Tensor | None = None
) -> Tensor:
    """`kernels.hash.hash_ngrams` for tensors that Triton can read. Tokens and positions may have any strides."""
    batch, length = tokens_BT.shape
    tables, largest = spec.moduli_LS.shape[-1], spec.orders[-1]
    stacked = spec.moduli_LS.shape[:-1]
    rows_LBTS = torch.empty((*stacked, batch, length, tables), dtype=torch.int64, device=tokens_BT.device)
    if rows_LBTS.numel() == 0:
        return rows_LBTS
    padded_tables = triton.next_power_of_2(tables)
    block = max(1, _ROWS_A_PROGRAM // padded_tables)
    blocks = triton.cdiv(length, block)
    _hash_kernel[(batch * blocks, stacked.numel())](
        rows_LBTS,
        tokens_BT,
        positions_BT,
        spec.multipliers_LK if compressed_V is None else compressed_V,
        spec.multipliers_LK.contiguous(),
        spec.moduli_LS.contiguous(),
        spec.reciprocals_LS.contiguous(),
        spec.offsets_LS.contiguous(),
        batch,
        length,
        blocks,
        spec.pad_id,
        0 if compressed_V is None else compressed_V.shape[0],
        *tokens_BT.stride(),
        *positions_BT.stride(),
        COMPRESS=compressed_V is not None,
        CROSS_DOCUMENTS=spec.cross_documents,
        ORDERS=sum(1 << order for order in spec.orders),
        LARGEST_ORDER=largest,
        TABLES=tables,
        HEADS=tables // len(spec.orders),
        BLOCK_S=padded_tables,
        BLOCK_T=block,
        num_warps=_WARPS,
    )
    return rows_LBTS


@triton.jit(do_not_specialize=["pad_id", "vocabulary_size"])
def _hash_kernel(
    rows_ptr: tl.tensor, tokens_ptr: tl.tensor, positions_ptr: tl.tensor, compressed_ptr: tl.tensor,
    multipliers_ptr: tl.tensor, moduli_ptr: tl.tensor, reciprocals_ptr: tl.tensor, offsets_ptr: tl.tensor,
    batch: tl.int64, length: tl.int64, blocks: tl.int32, pad_id: tl.int64, vocabulary_size: tl.int64,
    token_stride_b: tl.int64, token_stride_t: tl.int64, position_stride_b: tl.int64, position_stride_t: tl.int64,
    COMPRESS: tl.constexpr, CROSS_DOCUMENTS: tl.constexpr, ORDERS: tl.constexpr, LARGEST_ORDER: tl.constexpr,
    TABLES: tl.constexpr, HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One module's rows of BLOCK_T tokens of one sequence. Bit n of ORDERS is set for order n."""
    module = tl.program_id(1).to(tl.int64)
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    place_T = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    table_S = tl.arange(0, BLOCK_S)
    inside_T, inside_S = place_T < length, table_S < TABLES

    # How far every token may look back.
    reach_T = place_T
    if not CROSS_DOCUMENTS:
        positions_T = positions_ptr + sequence * position_stride_b + place_T * position_stride_t
        reach_T = tl.minimum(tl.load(positions_T, inside_T, 0).to(tl.int64), place_T)

    mix_T = tl.zeros([BLOCK_T], tl.int64)
    mix_TS = tl.zeros([BLOCK_T, BLOCK_S], tl.int64)
    order_number = 0
    for distance in tl.static_range(LARGEST_ORDER):
        seen_T = inside_T & (reach_T >= distance)
        tokens_T = tokens_ptr + sequence * token_stride_b + (place_T - distance) * token_stride_t
        id_T = tl.load(tokens_T, seen_T, 0).to(tl.int64)
        if COMPRESS:
            seen_T = seen_T & (id_T >= 0) & (id_T < vocabulary_size)
            id_T = tl.load(compressed_ptr + id_T, seen_T, 0).to(tl.int64)
        id_T = tl.where(seen_T, id_T, pad_id)
        mix_T ^= id_T * tl.load(multipliers_ptr + module * LARGEST_ORDER + distance)
        if (ORDERS >> (distance + 1)) & 1:
            mix_TS = tl.where((table_S >= order_number * HEADS)[None, :], mix_T[:, None], mix_TS)
            order_number += 1

    numbers_S = module * TABLES + table_S
    modulus_S = tl.load(moduli_ptr + numbers_S, inside_S, 1).to(tl.uint64)
    reciprocal_S = tl.load(reciprocals_ptr + numbers_S, inside_S, 0).to(tl.uint64)
    row_TS = _remainder(mix_TS.to(tl.uint64), modulus_S[None, :], reciprocal_S[None, :]).to(tl.int64)
    row_TS += tl.load(offsets_ptr + numbers_S, inside_S, 0)[None, :]
    start = (module * batch + sequence) * length
    inside_TS = inside_T[:, None] & inside_S[None, :]
    tl.store(rows_ptr + (start + place_T)[:, None] * TABLES + table_S[None, :], row_TS, inside_TS)


@triton.jit
def _remainder(value: tl.tensor, modulus: tl.tensor, reciprocal: tl.tensor) -> tl.tensor:
    """value mod modulus without a division, for value < 2^63 and reciprocal = floor((2^64 - 1) / modulus).

    The reciprocal is at most 1 below 2^64 / modulus, so the quotient's estimate before it is rounded down is less than
    value / 2^64 < 1/2 below the true one, and rounded down at most 1 below: one correction is enough.
    """
    rest = value - tl.umulhi(value, reciprocal) * modulus
    return tl.where(rest >= modulus, rest - modulus, rest)
