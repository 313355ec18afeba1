"""Adam on records of whatever device."""

import torch

from kernels.rows.rate_history import RateHistory
from offload.config import TableOptimizerConfig
from offload.optimizers import OPTIMIZERS


def test_gaps_are_closed_on_the_device_of_the_records() -> None:
    adam, rates = OPTIMIZERS["adam"](TableOptimizerConfig(untouched_rows="closed")), RateHistory([1e-3] * 8)
    for device in ("cpu", "meta", "cpu"):
        weights, state = torch.zeros(3, 4, device=device), torch.ones(3, 8, device=device)
        adam.replay(weights, state, [2, 5, 7], rates, torch.empty(4, 3, 4, device=device))
        assert weights.is_meta or (weights != 0).all()
