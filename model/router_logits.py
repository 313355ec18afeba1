"""A router's logits, computed in fp32 also where tokens and weights are bf16.

So do DeepSeek-V3 in Hugging Face's transformers and DeepSeek's own code for it: experts are chosen by order, and logits
that bf16 rounds to the same number or swaps give tokens to other experts (`docs/exactness.md` has the share of them).

Shape suffixes: N tokens, E experts, D hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def router_logits(tokens_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """The product [N, E] of tokens and a router's weight, both of one dtype, in fp32 or in theirs if it is wider."""
    if tokens_ND.dtype in (torch.float32, torch.float64):
        return F.linear(tokens_ND, weight_ED)
    logits_NE: Tensor = _Widened.apply(tokens_ND, weight_ED)
    return logits_NE


class _Widened(torch.autograd.Function):
    """Keeps tokens and weight for the backward as they came: autograd would keep a copy of the tokens in fp32."""

    @staticmethod
    def forward(ctx: Any, tokens_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_ND, weight_ED)
        return F.linear(tokens_ND.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor, Tensor]:
        tokens_ND, weight_ED = ctx.saved_tensors
        grad_ND = (grad_NE @ weight_ED.float()).to(tokens_ND.dtype)
        return grad_ND, (grad_NE.T @ tokens_ND.float()).to(weight_ED.dtype)
