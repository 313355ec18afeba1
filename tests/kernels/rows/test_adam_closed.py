"""Gaps that are evaluated at once: close to the sum of their steps, with bits of their own."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.rows.adam import replay_adam
from kernels.rows.adam_closed import GapSums, close_gaps
from kernels.rows.rate_history import RateHistory
from tests.grid import grid
from tests.kernels.row_records import same_bits

SCHEDULES = {
    "constant": lambda step: 1e-3,
    "warm-up": lambda step: 1e-3 * min(1, step / 500),
    "restarts": lambda step: 1e-3 * 0.5 * (1 + math.cos(math.pi * (step % 200) / 200)),
    "jumps": lambda step: 1e-6 if step // 100 % 2 else 1e-2,
}
BETAS = [(0.9, 0.95), (0.9, 0.999), (0.8, 0.9), (0.9, 0.9), (0.95, 0.99), (0.5, 0.95)]
STEPS = 1100


def history(schedule, steps=STEPS):
    return RateHistory(SCHEDULES[schedule](step) for step in range(1, steps + 1))


def elements():
    """Weights of 0, and moments with roots of the second far below and far above eps, and of 0."""
    roots = torch.cat([torch.logspace(-16, 2, 48), torch.zeros(1)])[None]
    return torch.zeros_like(roots), roots * 0.7 + 1e-14, roots * roots


def true_sum(parts, last, rates, betas, eps):
    """Move of the weights, the moments afterwards: in float64, from what the float32 steps multiply with."""
    _, means, squares = (part.double() for part in parts)
    decays = 1 - float(np.float32(1 - betas[0])), float(np.float32(betas[1]))
    moves = torch.zeros_like(means)
    for step in range(last + 1, len(rates) + 1):
        means, squares = means * decays[0], squares * decays[1]
        root = squares.sqrt() / math.sqrt(1 - betas[1] ** step)
        moves -= rates[step] / (1 - betas[0] ** step) * means / (root + eps)
    return moves, means, squares


@pytest.mark.parametrize(("betas", "schedule"), grid(BETAS, [*SCHEDULES]))
def test_a_gap_moves_a_row_within_1e_6_of_the_sum_of_its_steps(betas, schedule):
    rates = history(schedule)
    gaps = GapSums(rates, betas, 1e-8, "cpu")
    for last in (1, 2, 20, 300, 1000, 1050, STEPS - 2, STEPS - 1):
        parts = elements()
        moves, *moments = true_sum(parts, last, rates, betas, 1e-8)
        scale = moves
        if schedule == "jumps":  # late in a gap the rate is 10,000 times what it was: then of what that would have done
            scale, *_ = true_sum(parts, last, RateHistory([rates.peak_after(last)] * STEPS), betas, 1e-8)
        close_gaps(*parts, [last], gaps)
        assert ((parts[0].double() - moves).abs() <= 1e-6 * scale.abs()).all(), last
        for moment, true in zip(parts[1:], moments, strict=True):
            torch.testing.assert_close(moment.double(), true, rtol=1e-6, atol=1e-37)


def test_weights_are_closer_to_the_true_sum_than_those_of_replayed_rows():
    rates, betas, generator = history("restarts"), (0.9, 0.95), torch.Generator().manual_seed(0)
    weights = torch.randn(50, 16, generator=generator) * 0.02
    means = torch.randn(50, 16, generator=generator) * 10 ** torch.linspace(-10, 0, 50)[:, None]
    squares = means**2 * torch.rand(50, 16, generator=generator)
    last, gaps = [STEPS - 400] * 50, GapSums(rates, betas, 1e-8, "cpu")
    closed, exact = ([part.clone() for part in (weights, means, squares)] for _ in range(2))
    close_gaps(*closed, last, gaps)
    replay_adam(*exact, last, rates, betas=betas, eps=1e-8)
    moves, *_ = true_sum((weights, means, squares), last[0], rates, betas, 1e-8)
    errors = [(rows[0] - (weights + moves)).abs() for rows in (closed, exact)]
    assert (errors[0] <= 2.0**-24 * closed[0].abs() + 1e-6 * moves.abs()).all()
    assert errors[0].max() < errors[1].max()


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999)], ids=str)
def test_sums_are_the_same_bits_whenever_they_are_asked_for(betas):
    growing, whole = RateHistory(), history("warm-up")
    step_by_step = GapSums(growing, betas, 1e-8, "cpu", capacity=3)
    for step in range(1, STEPS + 1):
        growing.append(whole[step])
        if step < 50 or step % 7 == 0:
            step_by_step.sums()
    at_once = GapSums(whole, betas, 1e-8, "cpu", capacity=5000)
    assert torch.equal(step_by_step.sums()[: STEPS + 1], at_once.sums()[: STEPS + 1])
    assert same_bits(step_by_step.decays()[:STEPS], at_once.decays()[:STEPS])


class OnDevice(TorchDispatchMode):
    """Counts what a device would be given to do, views apart."""

    operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        self.operations += not operation.is_view and any(tensor.is_meta for tensor in tensors)
        return result


def test_a_device_is_given_little_to_do_for_a_step_early_in_a_run():
    rates = history("constant", 50)
    gaps = GapSums(rates, (0.9, 0.999), 1e-8, "meta")
    gaps.sums()
    rates.append(1e-3)
    with OnDevice() as counted:
        gaps.sums()
    assert 0 < counted.operations <= 4


def test_a_row_is_the_same_in_any_company():
    rates, generator = history("jumps"), torch.Generator().manual_seed(0)
    gaps = GapSums(rates, (0.9, 0.95), 1e-8, "cpu")
    last = list(range(1, STEPS, 50))
    rows = torch.randn(3, len(last), 37, generator=generator).abs()
    together = rows.clone()
    close_gaps(*together, last, gaps)
    for row in range(len(last)):
        alone = rows[:, row : row + 1, 5:9].clone()
        close_gaps(*alone, last[row : row + 1], gaps)
        assert same_bits(alone, together[:, row : row + 1, 5:9])
