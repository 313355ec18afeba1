"""A stream's parts and their weights, as arguments of Triton kernels and inside them.

Shape suffixes as in `kernels.branches`, and N tokens (batch x sequence).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

VECTOR = tl.constexpr(8)
"""Adjacent columns per thread."""
WARP = 32
_COLUMNS = 1024
"""The most columns of a program that has only some of a token's: four warps."""


def columns_of(width: int) -> tuple[int, int]:
    """Columns of one token that a program has at a time, and its warps."""
    columns = min(_COLUMNS, max(VECTOR.value, triton.next_power_of_2(width)))
    return columns, max(1, columns // (VECTOR.value * WARP))


def gradients_of(weights_BTJI: Tensor | None, base_BTMD: Tensor, outputs_BTD: list[Tensor]) -> list[Tensor]:
    """Buffers for the gradients of weights, if there are any, base and outputs, contiguous."""
    parts = [part.new_empty(part.shape) for part in (base_BTMD, *outputs_BTD)]
    return parts if weights_BTJI is None else [weights_BTJI.new_empty(weights_BTJI.shape), *parts]


def rows_of(tensor: Tensor) -> Tensor:
    """[B, T, ...] as [N, ...], with stride 1 in the last dimension: copied only where no view has that."""
    tensor = tensor.flatten(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def weights_of(weights_BTJI: Tensor | None) -> tuple[Any, ...]:
    """Weights, if there are any, and their strides, as a kernel takes them."""
    if weights_BTJI is None:
        return None, 0, 0, 0
    weights_NJI = weights_BTJI.flatten(0, 1)
    return weights_NJI, *weights_NJI.stride()


def parts_of(base_BTMD: Tensor, outputs_BTD: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The parts as a kernel takes them: base, its two strides, outputs, their strides; and the sizes M, K and D."""
    base_NMD, outputs_ND = rows_of(base_BTMD), tuple(rows_of(output) for output in outputs_BTD)
    arguments = base_NMD, *base_NMD.stride()[:2], outputs_ND, tuple(output.stride(0) for output in outputs_ND)
    return arguments, {"M": base_NMD.shape[1], "K": len(outputs_ND), "D": base_NMD.shape[2]}


@triton.jit
def load_parts(
    base_ptr: tl.tensor, base_token: tl.tensor, base_branch: tl.tensor, outputs: tl.tuple, output_tokens: tl.tuple,
    token: tl.tensor, at: tl.tensor, live: tl.tensor, M: tl.constexpr, K: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The columns `at` of every part of `token`, in the parts' dtype."""
    parts: tl.tuple = ()
    for m in tl.static_range(M):
        parts += (tl.load(base_ptr + token * base_token + m * base_branch + at, mask=live, other=0.0),)
    for k in tl.static_range(K):
        parts += (tl.load(outputs[k] + token * output_tokens[k] + at, mask=live, other=0.0),)
    return parts


@triton.jit
def load_weights(
    weights_ptr: tl.tensor, weights_token: tl.tensor, weights_row: tl.tensor, weights_part: tl.tensor,
    token: tl.tensor, J: tl.constexpr, I: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """The weights of `token`, row by row."""
    weights: tl.tuple = ()
    for j in tl.static_range(J):
        for i in tl.static_range(I):
            weights += (tl.load(weights_ptr + token * weights_token + j * weights_row + i * weights_part),)
    return weights


@triton.jit
def mixture(parts: tl.tuple, weights: tl.tuple, MIXED: tl.constexpr, ROW: tl.constexpr, I: tl.constexpr) -> tl.tensor:
    """One row's mixture of the parts in fp32; if nothing is mixed, the part with the row's number."""
    mixed = parts[ROW].to(tl.float32)
    if MIXED:
        mixed = weights[ROW * I] * parts[0].to(tl.float32)
        for i in tl.static_range(1, I):
            mixed += weights[ROW * I + i] * parts[i].to(tl.float32)
    return mixed
