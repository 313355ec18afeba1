"""What a training step did, as the loop tells those that report it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: this rank's summed loss over the number of labels of all ranks: the ranks' sum is the step's loss.
        grad_norm: of the raw gradient, backbone and tables together.
        lr: learning rate of the backbone.
        refused: why weights and rows were not updated, in words; None if they were.
    """

    loss: Tensor
    grad_norm: float
    lr: float
    refused: str | None = None
