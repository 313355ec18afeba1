"""Mixtures and projections in plain PyTorch. Formulas and shape suffixes: `kernels.branches`."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Mix(torch.autograd.Function):
    """See `kernels.branches.mix_branches`."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, base: Tensor, *outputs: Tensor) -> Tensor:
        """See `torch.autograd.Function`."""
        ctx.save_for_backward(weights, base, *outputs)
        mixtures = _mix(weights, _parts(base, outputs))
        # Never a cast to the same dtype: torch 2.11's compiler loses the gradients of such a result.
        return mixtures if mixtures.dtype == base.dtype else mixtures.to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTJD: Tensor) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        weights, base, *outputs = ctx.saved_tensors
        return _mix_backward(_wide(grad_BTJD), weights, base, outputs)


class Project(torch.autograd.Function):
    """See `kernels.branches.project_branches`."""

    @staticmethod
    def forward(
        ctx: Any, projection: Tensor, eps: float, weights: Tensor | None, base: Tensor, *outputs: Tensor
    ) -> Tensor:
        """See `torch.autograd.Function`."""
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
        """See `torch.autograd.Function`."""
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
