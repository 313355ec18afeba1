"""A residual stream of several branches, kept as its base and the outputs added since instead of written out.

With the base x_0 [M, D] and sublayer outputs F_1 ... F_k [D], the stream is, token by token, x = W [x_0; F_1; ...; F_k]
with a small W [M, M + k]. Everything read from it and every later stream is such a product too, so that between two
written streams the backward needs only the outputs and the small matrices, not the streams.

Sums over streams, which keep their own dtype, are taken in fp32 (fp64 for fp64) and rounded once. On a GPU this is
Triton if all parts, at most six, are bf16 or all are fp32.

Shape suffixes: B batch, T sequence, M branches, D hidden, k outputs, I = M + k parts, J results of a mixture,
C = M * D, K projections.
"""

import torch
from torch import Tensor

from kernels.branches.operations import fused_mix, fused_project
from kernels.branches.reference import Mix, Project


def mix_branches(weights_BTJI: Tensor, base_BTMD: Tensor, *outputs_BTD: Tensor) -> Tensor:
    """Returns the mixtures W [x_0; F_1; ...] [B, T, J, D], in the dtype of the base.

    `weights_BTJI` is fp32 (fp64 for fp64). Saved for the backward: the arguments.

    Raises:
        ValueError: there are not as many weights as parts.
    """
    parts = base_BTMD.shape[2] + len(outputs_BTD)
    if weights_BTJI.shape[-1] != parts:
        raise ValueError(f"{weights_BTJI.shape[-1]} weights for {parts} parts of the stream")
    if _fused(base_BTMD, *outputs_BTD):
        fused_BTJD: Tensor = fused_mix(weights_BTJI, base_BTMD, list(outputs_BTD))
        return fused_BTJD
    mixtures_BTJD: Tensor = Mix.apply(weights_BTJI, base_BTMD, *outputs_BTD)
    return mixtures_BTJD


def project_branches(
    projection_KC: Tensor, weights_BTMI: Tensor | None, base_BTMD: Tensor, *outputs_BTD: Tensor, eps: float
) -> Tensor:
    """Returns P RMSNorm(vec x) [B, T, K] in fp32 (fp64 for fp64), x the stream; the norm has no weight.

    Args:
        projection_KC: P; in bf16 on a GPU it is multiplied as is, and summed in fp32.
        weights_BTMI: W of the stream; None if the stream is its base.
        base_BTMD: x_0.
        outputs_BTD: F_1, F_2, ...
        eps: added to the mean square under the norm.

    Saved for the backward: the arguments and K + 1 numbers per token; the stream is mixed again.
    """
    if projection_KC.dtype == base_BTMD.dtype and _fused(base_BTMD, *outputs_BTD):
        fused_BTK, _ = fused_project(projection_KC, eps, weights_BTMI, base_BTMD, list(outputs_BTD))
        return fused_BTK
    projected_BTK: Tensor = Project.apply(projection_KC, eps, weights_BTMI, base_BTMD, *outputs_BTD)
    return projected_BTK


_MOST_PARTS = 6
"""The most parts that the Triton kernels keep in registers: four branches and both outputs of a block."""


def _fused(base_BTMD: Tensor, *outputs_BTD: Tensor) -> bool:
    known = base_BTMD.is_cuda and base_BTMD.dtype in (torch.bfloat16, torch.float32)
    alike = all(output.dtype == base_BTMD.dtype for output in outputs_BTD)
    return known and alike and base_BTMD.shape[2] + len(outputs_BTD) <= _MOST_PARTS
