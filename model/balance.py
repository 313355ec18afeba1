"""Load balancing: by a bias, without an auxiliary loss, and by a small loss within each sequence.

The bias (Wang et al. 2024; DeepSeek-V3 report, section 2.1.2): after each step, the bias under which a layer chooses
experts rises by `rate` for experts that got fewer tokens than the mean, and falls by `rate` for those that got more.

All of it works alike on our `MoE` and on the layer that expert parallelism puts in its place (`model.moe`): either
keeps `tokens_per_expert`, and the bias in its router.

The loss (DeepSeek-V3 report, equations 17 to 20). For a sequence of T tokens, E experts, K of them a token,

    L = sum_e f_e P_e    f_e = E / (K T) * tokens that chose e    P_e = mean over the tokens of s_e / sum_j s_j

with the scores s before the bias; gradients flow through P alone. L is 1 where load or scores are even.

Shape suffixes: L layers, B batch, T sequence, D hidden, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
    counts_LE = torch.stack([counts for counts, _ in layers]).double()
    reduce(counts_LE)
    step_LE = rate * (counts_LE.mean(dim=1, keepdim=True) - counts_LE).sign()
    with torch.no_grad():
        for (counts, bias), step in zip(layers, step_LE, strict=True):
            bias += step.to(bias.dtype)
            counts.zero_()
    return counts_LE


def reset_counts(model: nn.Module) -> None:
    """Forgets the tokens counted so far: a layer in our `MoE`'s place also counts those of evaluation."""
    for counts, _ in _balanced_layers(model):
        counts.zero_()


def sequence_balance(moe: nn.Module, hidden_BTD: Tensor, experts_per_token: int) -> Tensor:
    """The balance loss of every sequence in one layer, before any factor: [B], fp32 or wider.

    The router's scores are computed here a second time, as a layer in our `MoE`'s place does not tell them; the experts
    cost hundreds of times as much.

    Args:
        moe: our `MoE`, or a layer in its place.
        hidden_BTD: the layer's input.
        experts_per_token: K.
    """
    router = _router(moe)
    if hasattr(moe, "router"):
        logits_BTE = router.gate(hidden_BTD)
        scores_BTE = torch.sigmoid(logits_BTE.to(torch.promote_types(logits_BTE.dtype, torch.float32)))
    else:
        scores_BTE = router(hidden_BTD.flatten(0, 1))[2].unflatten(0, hidden_BTD.shape[:2])
    chosen_BTK = (scores_BTE + router.e_score_correction_bias).detach().topk(experts_per_token, dim=-1).indices
    load_BE = torch.zeros_like(scores_BTE).scatter(-1, chosen_BTK, 1.0).mean(dim=1)
    share_BE = (scores_BTE / (scores_BTE.sum(dim=-1, keepdim=True) + 1e-20)).mean(dim=1)
    return (load_BE * share_BE).sum(dim=-1) * (scores_BTE.shape[-1] / experts_per_token)


@contextmanager
def counted_once(model: nn.Module) -> Iterator[None]:
    """What is computed within does not count: for a forward that is repeated."""
    layers = [(counts, counts.clone()) for counts, _ in _balanced_layers(model)]
    try:
        yield
    finally:
        for counts, before in layers:
            counts.copy_(before)


def _balanced_layers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for module in model.modules():
        counts = getattr(module, "tokens_per_expert", None)
        if isinstance(counts, Tensor):
            yield counts, _router(module).e_score_correction_bias


def _router(moe: nn.Module) -> Any:
    """The router of our `MoE`, or of a layer in its place."""
    return moe.router if hasattr(moe, "router") else moe.gate
