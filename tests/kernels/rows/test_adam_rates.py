import itertools

import torch

from kernels.rows.adam_rates import AdamRates
from kernels.rows.rate_history import RateHistory
from tests.kernels.row_records import same_bits


def test_rates_follow_the_history(kernel_device):
    history = RateHistory()
    rates = AdamRates(history, (0.9, 0.95), 1e-8, kernel_device, capacity=2)
    for step, count in itertools.pairwise([0, 1, 2, 3, 40]):
        for added in range(step, count):
            history.append(1e-3 * (added + 1))
        scalars = rates.scalars()
        assert len(rates) == count
    expected = torch.tensor([[-1e-3 * t / (1 - 0.9**t), (1 - 0.95**t) ** 0.5] for t in range(1, 41)])
    assert same_bits(scalars[1:41], expected)
    assert rates.peak_rate == 40 * 1e-3


def test_steps_are_copied_once(kernel_device):
    history = RateHistory([1e-3, 2e-3])
    rates = AdamRates(history, (0.9, 0.95), 1e-8, kernel_device)
    rates.scalars()[1] = 7.0
    history.append(3e-3)
    scalars = rates.scalars()
    assert scalars[1].tolist() == [7.0, 7.0]
    assert (scalars[2:4] != 0).all()
    assert (scalars[4:] == 0).all()
