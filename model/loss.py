"""Cross-entropy of a large vocabulary without the logits of a whole batch.

Logits are computed for some tokens at a time. As the loss is the last thing that a forward pass computes, its gradients
are computed along with it, from the same logits, and scaled in the backward: nothing is computed twice, and what is
kept for the backward are the gradients of the hidden states and of the head, N D + V D numbers; never N V.

Shape suffixes: N tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Label of a token without a loss."""

_CPU_CHUNK, _GPU_CHUNK = 2**21, 2**27
"""Logits that are in memory at once: 8 MiB in fp32, near a CPU's caches; 512 MiB, enough work for a GPU's product."""

_LEAST_TOKENS = 128
"""Per chunk: each chunk reads the whole head, and writes its whole gradient."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    chunk: int | None = None,
    losses_N: Tensor | None = None,
) -> Tensor:
    """The sum of the cross-entropies, in nats, of the logits `hidden_ND @ weight_VD.T`.

    Args:
        hidden_ND: floating, on any device.
        weight_VD: the head, in the same dtype.
        labels_N: int64; `IGNORED` where there is no loss.
        chunk: tokens whose logits are computed at once; None takes what suits the device.
        losses_N: fp32 (fp64 for fp64); each label's cross-entropy is written into it, 0 where there is none.

    Returns:
        Scalar in fp32 (fp64 for fp64); 0, with zero gradients, if all labels are `IGNORED`. Softmax and sums are
        computed in this type, products in that of the arguments.

    Raises:
        RuntimeError: on a CPU, a label that is neither `IGNORED` nor an entry of the vocabulary.
    """
    if chunk is None:
        chunk = max(_LEAST_TOKENS, (_GPU_CHUNK if hidden_ND.is_cuda else _CPU_CHUNK) // weight_VD.shape[0])
    # A Function's own forward cannot tell: gradients are off in it, and arguments still say what they require.
    wanted = [x.requires_grad and torch.is_grad_enabled() for x in (hidden_ND, weight_VD)]
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N, chunk, wanted, losses_N)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk: int,
        wanted: list[bool],
        losses_N: Tensor | None,
    ) -> Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=dtype) if wanted[1] else None
        for start in range(0, hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_CV = F.linear(hidden_ND[part], weight_VD).to(dtype)
            losses_C1 = _losses_of(logits_CV, labels_N[part])
            loss += losses_C1.sum()
            if losses_N is not None:
                losses_N[part] = losses_C1.squeeze(1)
            if any(wanted):
                dlogits_CV = logits_CV.to(hidden_ND.dtype)
                if dhidden_ND is not None:
                    torch.mm(dlogits_CV, weight_VD, out=dhidden_ND[part])
                if dweight_VD is not None:
                    _add_product(dweight_VD, dlogits_CV.mT, hidden_ND[part])
                del dlogits_CV
            del logits_CV  # before the next chunk's are in memory
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        if dhidden_ND is not None:
            dhidden_ND = (dhidden_ND * grad).to(dhidden_ND.dtype)
        if dweight_VD is not None:
            dweight_VD = (dweight_VD * grad).to(ctx.weight_dtype)
        return dhidden_ND, dweight_VD, None, None, None, None


def _losses_of(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Returns the chunk's losses; `logits_CV` becomes the gradient of their sum."""
    ignored_C1 = (labels_C == IGNORED).unsqueeze(1)
    labels_C1 = labels_C.unsqueeze(1).masked_fill(ignored_C1, 0)
    largest_C1 = logits_CV.amax(dim=1, keepdim=True)
    of_labels_C1 = logits_CV.gather(1, labels_C1)
    sums_C1 = logits_CV.sub_(largest_C1).exp_().sum(dim=1, keepdim=True)
    losses_C1 = (sums_C1.log() + largest_C1 - of_labels_C1).masked_fill_(ignored_C1, 0.0)
    logits_CV.mul_(sums_C1.reciprocal())
    logits_CV.scatter_add_(1, labels_C1, torch.full_like(sums_C1, -1.0))
    if ignored_C1.is_cuda or ignored_C1.any():  # a GPU would have to be waited for
        logits_CV.masked_fill_(ignored_C1, 0.0)
    return losses_C1


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
