"""A residual stream of several branches that is not written out: its base, and what was added to it since.

With the base x_0 [M, D] and sublayer outputs F_1 ... F_k [D], the stream is, token by token, x = W [x_0; F_1; ...; F_k]
with a small W [M, M + k]. Every reading of it and every later stream is such a product too, so that between two written
streams only the outputs and the small matrices need to be kept for the backward, not the streams.

Sums are taken in fp32 (fp64 for fp64), from streams in their own dtype, and rounded once. On a GPU this is Triton, in
bf16 or fp32 alike and with no more than six parts.

Shape suffixes: B batch, T sequence, M branches, D hidden, k outputs, I = M + k parts, J results of a mixture,
C = M * D, K projections.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.branch_operations import fused_mix, fused_project


def mix_branches(weights_BTJI: Tensor, base_BTMD: Tensor, *outputs_BTD: Tensor) -> Tensor:
    """Returns the mixtures W [x_0; F_1; ...] [B, T, J, D], in the dtype of the base.

    `weights_BTJI` is fp32 (fp64 for fp64). Saved for the backward: the arguments.

    Raises:
        ValueError: the weights are not as many as the parts.
    """
    parts = base_BTMD.shape[2] + len(outputs_BTD)
    if weights_BTJI.shape[-1] != parts:
        raise ValueError(f"{weights_BTJI.shape[-1]} weights for {parts} parts of the stream")
    if _fused(base_BTMD, *outputs_BTD):
        fused_BTJD: Tensor = fused_mix(weights_BTJI, base_BTMD, list(outputs_BTD))
        return fused_BTJD
    mixtures_BTJD: Tensor = _Mix.apply(weights_BTJI, base_BTMD, *outputs_BTD)
    return mixtures_BTJD


def project_branches(
    projection_KC: Tensor, weights_BTMI: Tensor | None, base_BTMD: Tensor, *outputs_BTD: Tensor, eps: float
) -> Tensor:
    """Returns P RMSNorm(vec x) [B, T, K] in fp32 (fp64 for fp64), x the stream; the norm has no weight.

    Args:
        projection_KC: P; on a GPU in bf16 it is multiplied there as it is, and summed in fp32.
        weights_BTMI: W of the stream; None if the stream is its base.
        base_BTMD: x_0.
        outputs_BTD: F_1, F_2, ...
        eps: added to the mean square under the norm.

    Saved for the backward: the arguments and K + 1 numbers a token; the stream is mixed again.
    """
    if projection_KC.dtype == base_BTMD.dtype and _fused(base_BTMD, *outputs_BTD):
        fused_BTK, _ = fused_project(projection_KC, eps, weights_BTMI, base_BTMD, list(outputs_BTD))
        return fused_BTK
    projected_BTK: Tensor = _Project.apply(projection_KC, eps, weights_BTMI, base_BTMD, *outputs_BTD)
    return projected_BTK


_MOST_PARTS = 6
"""Most parts that the Triton kernels keep in registers: four branches and both outputs of a block."""


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, base: Tensor, *outputs: Tensor) -> Tensor:
        ctx.save_for_backward(weights, base, *outputs)
        mixtures = _mix(weights, _parts(base, outputs))
        # Never a cast to the same dtype: with such a result torch 2.11's compiler loses the gradients.
        return mixtures if mixtures.dtype == base.dtype else mixtures.to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTJD: Tensor) -> tuple[Tensor | None, ...]:
        weights, base, *outputs = ctx.saved_tensors
        return _mix_backward(_wide(grad_BTJD), weights, base, outputs)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projection: Tensor, eps: float, weights: Tensor | None, base: Tensor, *outputs: Tensor
    ) -> Tensor:
        stream_NC = _stream(weights, base, outputs)
        width = stream_NC.shape[1]
        norm_N1 = torch.linalg.vector_norm(stream_NC, dim=1, keepdim=True, dtype=_wide_dtype(base))
        scale_N1 = torch.rsqrt(norm_N1.square() / width + eps)
        projected_NK = product(stream_NC, projection.mT) * scale_N1
        ctx.save_for_backward(projection, projected_NK, scale_N1, weights, base, *outputs)
        return projected_NK.view(*base.shape[:2], len(projection))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTK: Tensor) -> tuple[Tensor | None, ...]:
        projection, projected_NK, scale_N1, weights, base, *outputs = ctx.saved_tensors
        stream_NC = _stream(weights, base, outputs)
        grad_NK = _wide(grad_BTK).flatten(0, 1)
        scaled_NK = grad_NK * scale_N1
        # The norm's own part: d(scale)/dx = -scale^3 x / C, and the projections are proportional to the scale.
        pull_N1 = (grad_NK * projected_NK).sum(dim=1, keepdim=True) * scale_N1.square() / stream_NC.shape[1]
        dstream_NC = product(scaled_NK, projection).addcmul_(pull_N1, _wide(stream_NC), value=-1)
        dprojection = product(scaled_NK.mT, stream_NC).to(projection.dtype)
        dstream = dstream_NC.view(base.shape)
        if weights is None:
            return dprojection, None, None, dstream.to(base.dtype)
        return dprojection, None, *_mix_backward(dstream, weights, base, outputs)


def _mix(weights_BTJI: Tensor, parts_BTID: Tensor) -> Tensor:
    return weights_BTJI @ parts_BTID


def _mix_backward(
    grad_BTJD: Tensor, weights_BTJI: Tensor, base_BTMD: Tensor, outputs: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of the weights, of the base and of every output."""
    dweights = grad_BTJD @ _parts(base_BTMD, outputs).mT
    dparts_BTID = (weights_BTJI.mT @ grad_BTJD).to(base_BTMD.dtype)
    branches = base_BTMD.shape[2]
    return dweights, dparts_BTID[:, :, :branches], *dparts_BTID[:, :, branches:].unbind(dim=2)


def _stream(weights: Tensor | None, base: Tensor, outputs: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The stream [N, C] in its own dtype, N = B * T."""
    stream = base if weights is None else _mix(weights, _parts(base, outputs)).to(base.dtype)
    return stream.reshape(-1, base.shape[2] * base.shape[3])


def _parts(base_BTMD: Tensor, outputs: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.cat([_wide(base_BTMD), *(_wide(output).unsqueeze(2) for output in outputs)], dim=2)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Returns left @ right, summed in fp32 at least; a GPU's tensor cores multiply where `right` is bf16."""
    if right.is_cuda and right.dtype == torch.bfloat16:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    return _wide(left) @ _wide(right)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _fused(base_BTMD: Tensor, *outputs_BTD: Tensor) -> bool:
    known = base_BTMD.is_cuda and base_BTMD.dtype in (torch.bfloat16, torch.float32)
    alike = all(output.dtype == base_BTMD.dtype for output in outputs_BTD)
    return known and alike and base_BTMD.shape[2] + len(outputs_BTD) <= _MOST_PARTS
