"""Bias-free linear map and embedding that draw their weights as they are made.

Weights are drawn inside each module's constructor, not by a pass over the finished model, so that it also works where
a constructor's parameters are sharded at once (ZeRO 3) or never exist (the meta device). All draws come from torch's
global generator, in the order of construction.
"""

from torch import nn


class Linear(nn.Linear):
    """x -> x W^T with W [outputs, inputs] drawn from normal(0, std)."""

    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        self.std = std
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Draws the weight."""
        nn.init.normal_(self.weight, std=self.std)


class Embedding(nn.Embedding):
    """Token ids -> rows of a [vocabulary, width] weight drawn from normal(0, std)."""

    def __init__(self, vocabulary: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(vocabulary, width)

    def reset_parameters(self) -> None:
        """Draws the weight."""
        nn.init.normal_(self.weight, std=self.std)
