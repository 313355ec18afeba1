"""What a training step did, as the loop tells those that report it."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        loss: this rank's summed loss over the number of labels of all ranks: the ranks' sum is the step's loss.
        grad_norm: of the raw gradient, backbone and tables together; not finite if the step was skipped.
        lr: learning rate of the backbone.
    """

    loss: Tensor
    grad_norm: float
    lr: float

    @property
    def applied(self) -> bool:
        """Whether weights and rows were updated."""
        return math.isfinite(self.grad_norm)
