"""Load balancing: by a bias, without an auxiliary loss, and by a small loss within each sequence.

The bias (Wang et al. 2024; DeepSeek-V3 report, section 2.1.2): after each step, the bias under which a layer chooses
experts rises by `rate` for experts that got fewer tokens than the mean, and falls by `rate` for those that got more.

Both work on every layer that is `Balanced`: our `MoE`, and what expert parallelism puts in its place.

The loss (DeepSeek-V3 report, equations 17 to 20). For a sequence of T tokens, E experts, K of them per token,

    L = sum_e f_e P_e    f_e = E / (K T) * tokens that chose e    P_e = mean over the tokens of s_e / sum_j s_j

with the scores s before the bias; gradients flow through P alone. L is 1 where load or scores are even.

Shape suffixes: L layers, B batch, T sequence, D hidden, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn


class Balanced(Protocol):
    """A mixture-of-experts layer that can be balanced: `model.moe.MoE`, or what an engine put in its place."""

    tokens_per_expert: Tensor
    """fp32 [E]: assignments since the counts were last set to zero."""

    @property
    def choice_bias(self) -> Tensor:
        """fp32 [E], added to the scores when experts are chosen; moved in place."""

    def scores(self, hidden_BTD: Tensor) -> Tensor:
        """The router's scores [B, T, E] before the bias, fp32 or wider."""


def update_balance(model: nn.Module, rate: float, reduce: Callable[[Tensor], None]) -> Tensor:
    """Moves every MoE layer's bias by one step, sets the counts to zero, and returns the counts [layers, E], fp64.

    Args:
        model: the model, or a wrapper around it. Without MoE layers nothing happens and `reduce` is not called.
        rate: step of the bias; 0 leaves it alone.
        reduce: sums an fp64 tensor in place over all ranks that train on different tokens; called once, with the
            counts of all layers. Every rank ends with the same bias, given that all began with the same.

    Call it once after each optimizer step. After evaluation and skipped steps call `reset_counts`.
    """
    layers = list(_balanced_layers(model))
    if not layers:
        return torch.empty(0, 0, dtype=torch.float64)
    counts_LE = torch.stack([layer.tokens_per_expert for layer in layers]).double()
    reduce(counts_LE)
    step_LE = rate * (counts_LE.mean(dim=1, keepdim=True) - counts_LE).sign()
    with torch.no_grad():
        for layer, step_E in zip(layers, step_LE, strict=True):
            layer.choice_bias.add_(step_E.to(layer.choice_bias.dtype))
            layer.tokens_per_expert.zero_()
    return counts_LE


def reset_counts(model: nn.Module) -> None:
    """Sets the counts to zero: a layer in our `MoE`'s place also counts the tokens of evaluation."""
    for layer in _balanced_layers(model):
        layer.tokens_per_expert.zero_()


def sequence_balance(moe: Balanced, hidden_BTD: Tensor, experts_per_token: int) -> Tensor:
    """The balance loss of every sequence in one layer, before any factor: [B], fp32 or wider.

    The router's scores are computed a second time, as an engine's layer does not return them; the experts cost hundreds
    of times as much.

    Args:
        moe: the layer.
        hidden_BTD: its input.
        experts_per_token: K.
    """
    scores_BTE = moe.scores(hidden_BTD)
    chosen_BTK = (scores_BTE + moe.choice_bias).detach().topk(experts_per_token, dim=-1).indices
    load_BE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, 1.0).mean(dim=1)
    share_BE = (scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)).mean(dim=1)
    return (load_BE * share_BE).sum(dim=-1) * (scores_BTE.shape[-1] / experts_per_token)


@contextmanager
def counted_once(model: nn.Module) -> Iterator[None]:
    """Leaves the counts as they were: for a forward that is repeated."""
    layers = [(layer.tokens_per_expert, layer.tokens_per_expert.clone()) for layer in _balanced_layers(model)]
    try:
        yield
    finally:
        for counts, before in layers:
            counts.copy_(before)


def _balanced_layers(model: nn.Module) -> Iterator[Balanced]:
    for module in model.modules():
        if isinstance(getattr(module, "tokens_per_expert", None), Tensor):
            yield cast(Balanced, module)
