"""Bias-free linear map and embedding that draw their weights on construction.

Weights are drawn inside each module's constructor, not by a pass over the finished model: this also works where a
constructor's parameters are sharded at once (ZeRO 3) or never exist (the meta device). All draws come from torch's
global generator, in the order of construction.
"""

from torch import Tensor, nn


def draw_normal(weight: Tensor, std: float) -> None:
    """Fills `weight` from normal(0, std); nothing on the meta device, where torch would import its compiler for it."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class Linear(nn.Linear):
    """x -> x W^T with W [outputs, inputs] drawn from normal(0, std)."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draws the weight."""
        draw_normal(self.weight, self.std)


class Embedding(nn.Embedding):
    """Token ids -> rows of a [vocabulary, width] weight drawn from normal(0, std)."""

    def __init__(self, vocabulary: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(vocabulary, width)

    def reset_parameters(self) -> None:
        """Draws the weight."""
        draw_normal(self.weight, self.std)
