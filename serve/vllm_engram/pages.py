"""What a batch's tokens look back to, in a cache of pages.

A request's tokens fill blocks, which its row of the block table names in order. Shape suffixes: T tokens of a batch,
R requests, K earlier tokens of each, B blocks of a request, N blocks of the cache, S places in a block, W width.
"""

import torch
from torch import Tensor


def request_of(starts_R1: Tensor, tokens: int) -> Tensor:
    """The request [T] of every token of a batch.

    Args:
        starts_R1: first token of each request in the batch, and the end of the last; they ascend.
        tokens: T. Those beyond the last request, which fill a batch up, count to the last.
    """
    numbers_T = torch.arange(tokens, device=starts_R1.device, dtype=starts_R1.dtype)
    return torch.bucketize(numbers_T, starts_R1[1:-1], right=True)


def keep(cache_NSW: Tensor, values_TW: Tensor, slots_T: Tensor) -> None:
    """Writes the values of a batch's tokens at their slots (block * S + place)."""
    size = cache_NSW.shape[1]
    cache_NSW[slots_T // size, slots_T % size] = values_TW.to(cache_NSW.dtype)


def earlier(
    cache_NSW: Tensor, positions_T: Tensor, request_T: Tensor, blocks_RB: Tensor, distances: list[int], empty: float
) -> Tensor:
    """The values [T, K, W] of the tokens at these distances before each, `empty` before a request's first.

    Args:
        positions_T: of the tokens in their requests, from 0.
        request_T: their requests.
        blocks_RB: block table; only blocks up to a token's own are read.
    """
    size = cache_NSW.shape[1]
    position_TK = positions_T.unsqueeze(1) - torch.tensor(distances, dtype=torch.int64, device=positions_T.device)
    missing_TK = position_TK < 0
    position_TK = position_TK.clamp(min=0)
    block_TK = blocks_RB[request_T.unsqueeze(1), position_TK // size]
    return cache_NSW[block_TK, position_TK % size].masked_fill(missing_TK.unsqueeze(-1), empty)
