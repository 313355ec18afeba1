"""Causal attention within the documents of packed sequences, in memory that grows with their length, not its square.

A token sees itself and earlier tokens of its own document. Two ways to the same result:

- FlexAttention, on a GPU in 16 bits, for sequences of whole blocks as training has them: one kernel, compiled per
  shape, which skips blocks of 128 x 128 that no document spans. These blocks are found from positions without waiting
  for the device.
- document by document, elsewhere (also for texts of any length): PyTorch's causal attention, whose kernels write no
  logits if values have as many columns as queries.

Shape suffixes: B batch, T sequence, H heads, Q query and key columns, V value columns, L = B*T, K blocks of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    # Only for type checkers: it imports the compiler, which takes seconds.
    from torch.nn.attention.flex_attention import BlockMask

_BLOCK = 128
_LEAST_COLUMNS = 16
"""The fewest columns of a head that FlexAttention takes on a GPU."""

_SHAPES = 64
"""How many FlexAttention may be compiled for: training's, and those of evaluated texts of whole blocks."""


@dataclass(frozen=True)
class Documents:
    """Which tokens belong together. One of the two is given.

    Not a tuple, as torch.compile looks into tuples: it would recompile for other lengths.
    """

    lengths: list[int] | None
    """The documents' lengths, in the order of the batch laid out as one row."""
    block_mask: "BlockMask | None"
    """For FlexAttention."""


def documents(positions_BT: Tensor, dtype: torch.dtype, least_columns: int) -> Documents:
    """Finds the documents, and how to compute attention within them.

    Args:
        positions_BT: int64 position within the token's document; a row's first token counts as a document's first.
        dtype: of queries, keys and values.
        least_columns: the smaller number of columns of a head's query and value.
    """
    starts_BT = positions_BT == 0
    starts_BT[:, 0] = True
    whole_blocks = positions_BT.shape[1] % _BLOCK == 0
    narrow = dtype in (torch.bfloat16, torch.float16)
    if positions_BT.is_cuda and narrow and whole_blocks and least_columns >= _LEAST_COLUMNS:
        return Documents(None, document_blocks(starts_BT.cumsum(dim=1, dtype=torch.int32)))
    first_L = starts_BT.flatten().nonzero().flatten()
    return Documents(first_L.diff(append=first_L.new_tensor([positions_BT.numel()])).tolist(), None)


def attend(
    query_BTHQ: Tensor,
    key_BTHQ: Tensor,
    value_BTHV: Tensor,
    within: Documents,
    scale: float,
    seen_B11L: Tensor | None = None,
) -> Tensor:
    """Returns softmax(scale * query . key) value [B, T, H, V], over what each token sees.

    Keys and values may begin with those of earlier tokens if there is one query, which then sees them all, or those
    of `seen_B11L` (bool, L keys).
    """
    if query_BTHQ.shape[1] != key_BTHQ.shape[1]:
        query, key, value = (x.transpose(1, 2) for x in (query_BTHQ, key_BTHQ, value_BTHV))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B11L, scale=scale)
        return mixed.transpose(1, 2)
    if within.block_mask is None:
        return _by_document(query_BTHQ, key_BTHQ, value_BTHV, within, scale)
    query, key, value = (x.transpose(1, 2) for x in (query_BTHQ, key_BTHQ, value_BTHV))
    mixed_BHTV: Tensor = _flex_attention()(query, key, value, block_mask=within.block_mask, scale=scale)
    return mixed_BHTV.transpose(1, 2)


def document_blocks(document_BT: Tensor) -> "BlockMask":
    """The blocks of keys that each block of queries sees, wholly or in part.

    Documents are intervals, so a block's first and last number suffice: no T x T mask is built.

    Args:
        document_BT: numbers of the tokens' documents, ascending in each row; T is a multiple of 128.
    """
    from torch.nn.attention.flex_attention import BlockMask

    length = document_BT.shape[1]
    first_BK, last_BK = document_BT[:, ::_BLOCK], document_BT[:, _BLOCK - 1 :: _BLOCK]
    blocks, device = first_BK.shape[1], document_BT.device
    earlier_KK = torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril(-1)
    seen_BKK = (last_BK.unsqueeze(1) >= first_BK.unsqueeze(2)) & earlier_KK
    full_BKK = seen_BKK & (first_BK.unsqueeze(1) == last_BK.unsqueeze(2))
    partial_BKK = (seen_BKK & ~full_BKK) | torch.eye(blocks, dtype=torch.bool, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[batch, query] == document_BT[batch, key])

    return BlockMask.from_kv_blocks(
        *_listed(partial_BKK), *_listed(full_BKK), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(chosen_BKK: Tensor) -> tuple[Tensor, Tensor]:
    """For every block of queries, the number of chosen blocks of keys, and all blocks with these first; int32."""
    order_BKK = chosen_BKK.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BKK.sum(dim=-1, dtype=torch.int32).unsqueeze(1), order_BKK.to(torch.int32).unsqueeze(1)


def _flex_attention() -> Callable[..., Any]:
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled_flex_attention()


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # Without the compiler, so also beyond its limit, FlexAttention computes all T x T logits.
    dynamo.recompile_limit = max(dynamo.recompile_limit, _SHAPES)
    return torch.compile(flex_attention, dynamic=False)


@torch._disable_dynamo  # the lengths differ from batch to batch; as torch.compiler.disable, without its import
def _by_document(query_BTHQ: Tensor, key_BTHQ: Tensor, value_BTHV: Tensor, within: Documents, scale: float) -> Tensor:
    assert within.lengths is not None
    batch, width = query_BTHQ.shape[0], value_BTHV.shape[-1]
    # The kernels that do not write the logits out want as many columns in values as in queries; zeros change nothing.
    columns = max(query_BTHQ.shape[-1], width)
    queries, keys, values = (
        F.pad(x, (0, columns - x.shape[-1])).flatten(0, 1).transpose(0, 1).unsqueeze(0).split(within.lengths, dim=2)
        for x in (query_BTHQ, key_BTHQ, value_BTHV)
    )
    mixed = [
        F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
        for query, key, value in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(mixed, dim=2).squeeze(0).transpose(0, 1).unflatten(0, (batch, -1))[..., :width]
