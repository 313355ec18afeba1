"""How far the gates of each Engram layer open in training, counted where they are computed, read with a record."""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.engram import GATE_UNIT, Engram


class Gates:
    """Counts from now on; without any Engram layer it does nothing.

    Args:
        model: whose gates.
        device: that they are computed on, and ranks communicate from.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, Engram)]
        # model.layers.3.engram
        self._layers = [next(part for part in name.split(".") if part.isdigit()) for name, _ in named]
        self._modules = [module for _, module in named]
        for module in self._modules:
            module.opened = torch.zeros(3, dtype=torch.int64, device=device)

    def restart(self) -> None:
        """Forgets all steps."""
        for module in self._modules:
            cast(Tensor, module.opened).zero_()

    def take(self) -> dict[str, float]:
        """By layer, over all branches, tokens and ranks: the mean opening, and the share open by more than half.

        Collective.
        """
        if not self._modules:
            return {}
        counts_L3 = torch.stack([cast(Tensor, module.opened) for module in self._modules])
        dist.all_reduce(counts_L3)
        found: dict[str, float] = {}
        for layer, (count, total, opened) in zip(self._layers, counts_L3.tolist(), strict=True):
            if count:
                found |= {f"gate.{layer}.mean": total * GATE_UNIT / count, f"gate.{layer}.open": opened / count}
        return found
