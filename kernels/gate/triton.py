"""The context gate of Engram in Triton. Formulas, shapes and dtypes: kernels/gate/__init__.py.

Forward, one program for some tokens of one branch: a pass over hidden states and keys for the score, a pass over the
value for the result. The backward is two kernels, which together touch every number once:

    tokens      reads the gradient of all branches and the value; writes dL/ds, and the gradient of the value
    elements    reads hidden states and keys; writes their gradients, and sums that of the weights over its own tokens

The two norm weights act only through their product, which is computed first. Its gradient is summed in a fixed order:
over tokens within a program, then over programs. No atomics; the same bits on every run.

Shape suffixes: N tokens (batch x sequence), M branches, D hidden, C chunks of tokens.
"""

import math

import torch
import triton
from torch import Tensor

from kernels.gate.kernels_triton import _gate_backward_elements, _gate_backward_tokens, _gate_forward_kernel

_TILE = 2048
"""Numbers of each input that a program holds at a time: 16 per thread with four warps, two 16-byte loads in bf16."""
_COLUMNS = 512
"""The widest tile: small enough to waste little where D is not a power of two."""
_CHUNKS, _CHUNK_TOKENS = 512, 64
"""The most partial sums of the weights' gradient, and the fewest tokens in one: small beside the other gradients."""


def gate_forward(
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    eps: float,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor]:
    """The gated values [B, T, M, D], and fp32 [3, B, T, M] for the backward: both norms' scales and the score."""
    batch, length, branches, width = hidden_BTMD.shape
    gated = value_BTD.new_empty((batch, length, branches, width))
    saved = hidden_BTMD.new_empty((3, batch, length, branches), dtype=torch.float32)
    tokens = batch * length
    if gated.numel() == 0:
        return gated, saved
    hidden, key, value = (_rows(t) for t in (hidden_BTMD, key_BTMD, value_BTD))
    tile, columns = _tile(width)
    with torch.cuda.device_of(hidden):
        _gate_forward_kernel[(branches * triton.cdiv(tokens, tile),)](
            hidden, key, value, _product(query_weight_MD, key_weight_MD), gated, *saved,
            tokens, eps, 1 / math.sqrt(width),
            *hidden.stride()[:2], *key.stride()[:2], value.stride(0),
            SIGNED_SQRT=signed_sqrt, M=branches, D=width, TOKENS=tile, COLUMNS=columns,
            num_warps=_warps(tile * columns),
        )  # fmt: skip
    return gated, saved


def gate_backward(
    grad_BTMD: Tensor,
    hidden_BTMD: Tensor,
    key_BTMD: Tensor,
    value_BTD: Tensor,
    query_weight_MD: Tensor,
    key_weight_MD: Tensor,
    saved: Tensor,
    signed_sqrt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs, each contiguous and in its input's dtype."""
    batch, length, branches, width = hidden_BTMD.shape
    tokens = batch * length
    if hidden_BTMD.numel() == 0:
        return _zeros(hidden_BTMD), _zeros(key_BTMD), _zeros(value_BTD), _zeros(query_weight_MD), _zeros(key_weight_MD)
    dhidden, dkey, dvalue = (t.new_empty(t.shape) for t in (hidden_BTMD, key_BTMD, value_BTD))
    grad, hidden, key, value = (_rows(t) for t in (grad_BTMD, hidden_BTMD, key_BTMD, value_BTD))
    tile, columns = _tile(width)
    per_chunk, chunks = _chunk(tokens)
    dscore_NM = saved.new_empty((tokens, branches))
    partial_CMD = saved.new_empty((chunks, branches, width))
    all_branches = triton.next_power_of_2(branches)
    with torch.cuda.device_of(hidden):
        _gate_backward_tokens[(tokens,)](
            grad, value, saved[2], dscore_NM, dvalue,
            *grad.stride()[:2], value.stride(0),
            SIGNED_SQRT=signed_sqrt, M=branches, D=width, BRANCHES=all_branches, COLUMNS=columns,
            num_warps=min(2, _warps(all_branches * columns)),
        )  # fmt: skip
        _gate_backward_elements[(triton.cdiv(width, columns), branches, chunks)](
            hidden, key, _product(query_weight_MD, key_weight_MD), *saved, dscore_NM, dhidden, dkey, partial_CMD,
            tokens, 1 / math.sqrt(width),
            *hidden.stride()[:2], *key.stride()[:2],
            M=branches, D=width, CHUNK=per_chunk, TOKENS=tile, COLUMNS=columns,
            num_warps=_warps(tile * columns),
        )  # fmt: skip
    dweight_MD = partial_CMD.sum(0)
    dquery_weight = (dweight_MD * key_weight_MD).to(query_weight_MD.dtype)
    dkey_weight = (dweight_MD * query_weight_MD).to(key_weight_MD.dtype)
    return dhidden, dkey, dvalue, dquery_weight, dkey_weight


def _rows(tensor: Tensor) -> Tensor:
    """[B, T, ...] as [N, ...], with stride 1 in the last dimension: copied only where no view has that."""
    tensor = tensor.flatten(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)


def _product(query_weight_MD: Tensor, key_weight_MD: Tensor) -> Tensor:
    return (query_weight_MD.float() * key_weight_MD.float()).contiguous()


def _tile(width: int) -> tuple[int, int]:
    """Tokens and columns of a tile."""
    columns = min(_COLUMNS, max(16, triton.next_power_of_2(width)))
    return min(16, _TILE // columns), columns


def _chunk(tokens: int) -> tuple[int, int]:
    """Tokens in a partial sum of the weights' gradient, and the number of such sums."""
    size = max(_CHUNK_TOKENS, triton.next_power_of_2(triton.cdiv(tokens, _CHUNKS)))
    return size, triton.cdiv(tokens, size)


def _warps(numbers: int) -> int:
    """Warps for a tile of `numbers` numbers: 16 per thread, up to four warps."""
    return max(1, min(4, numbers // 512))
