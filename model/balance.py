"""Auxiliary-loss-free load balancing (Wang et al. 2024; DeepSeek-V3 report, section 2.1.2).

After each step, the bias under which a layer chooses experts rises by `rate` for experts that got fewer tokens than
the mean, and falls by `rate` for those that got more. Works alike on our `MoE` and on the layer that DeepSpeed's
AutoEP puts in its place; both keep `tokens_per_expert`, and the bias in their router.
"""

from collections.abc import Callable, Iterator
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
    """Forgets the tokens counted so far: AutoEP's layer also counts those of evaluation."""
    for counts, _ in _balanced_layers(model):
        counts.zero_()


def _balanced_layers(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    for module in model.modules():
        counts = getattr(module, "tokens_per_expert", None)
        if isinstance(counts, Tensor):
            router: Any = module.router if hasattr(module, "router") else module.gate
            yield counts, router.e_score_correction_bias
