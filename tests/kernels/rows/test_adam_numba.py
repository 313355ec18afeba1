"""The compiled pass over records: the bits of dense Adam, whenever a row is used."""

import math

import pytest
import torch

from kernels.rows.adam_numba import read_rows, update_rows
from kernels.rows.adam_rates import AdamRates
from kernels.rows.rate_history import RateHistory
from tests.kernels.dense_adam import DenseAdam

ROWS, DIM = 40, 16  # whole vectors of the processor: torch's loop over what remains rounds otherwise
WORDS = 3 * DIM + 1


def fresh_window(weights):
    """Rows in random slots of a window with free slots between them."""
    slots = torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(1))[:ROWS]
    window = torch.full((2 * ROWS, WORDS), 7.0)
    window[slots] = 0
    window[slots, :DIM] = weights
    return window, slots


def versions(window):
    return window.view(torch.int32)[:, -1]


def rate(step):
    """Warm-up, decay to zero, a restart: rates that fall are not enough to let a row rest."""
    return 0.05 if step > 800 else 1e-3 * min(step / 100, 0.5 * (1 + math.cos(math.pi * step / 800)))


@pytest.mark.parametrize(
    ("betas", "eps"),
    [((0.9, 0.95), 1e-8), ((0.9, 0.999), 1e-8), ((0.4, 0.95), 1e-8), ((0.97, 0.9), 1e-8), ((0.5, 0.5), 0)],
)
def test_rows_that_come_back_after_1_to_400_steps_are_those_of_dense_adam(betas, eps):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(ROWS, DIM, generator=generator) * 0.02
    window, slots = fresh_window(weights)
    dense, rates = DenseAdam(weights, betas, eps or 1e-30), RateHistory()
    steps = AdamRates(rates, betas, eps or 1e-30, "cpu")
    seen, caught_up = torch.zeros(ROWS, DIM), torch.zeros(ROWS, WORDS)
    due = torch.randint(1, 30, (ROWS,), generator=generator)
    gaps = torch.logspace(0, math.log10(400), ROWS).ceil().long()
    due[-1] = 10**6  # never has a gradient
    for step in range(1, 1001):
        used = (due == step).nonzero().flatten()
        due[used] = step + (torch.rand(len(used), generator=generator) * gaps[used]).ceil().long().clamp(min=1)
        read_rows(window, slots[used], steps, seen[: len(used)], caught_up)
        assert torch.equal(seen[: len(used)], dense.weights.detach()[used])
        # Gradients with denormals and exact zeros among them.
        grad = torch.randn(len(used), DIM, generator=generator) * torch.tensor([1e-3, 1e-22, 0.0, 10.0]).repeat(4)
        rates.append(rate(step))
        update_rows(window, slots[used], steps, grad, caught_up, gradient_scale=0.25)
        dense.step(torch.zeros(ROWS, DIM).index_copy_(0, used, grad * 0.25), rate(step))
        assert (versions(window)[slots[used]] == step).all()
    read_rows(window, slots, steps, seen, caught_up)
    assert torch.equal(seen, dense.weights.detach())
    behind = (versions(window)[slots] > 0) & (versions(window)[slots] < len(steps))
    assert behind.sum() > ROWS / 2
    assert torch.equal(caught_up[behind][:, : 3 * DIM], torch.cat(dense.parts(), dim=1)[behind])
    free = torch.ones(2 * ROWS, dtype=torch.bool).index_fill_(0, slots, False)
    assert (window[free] == 7).all()


def test_lazy_rows_keep_their_moments_while_they_rest():
    weights = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    window, slots = fresh_window(weights)
    rates = RateHistory()
    steps = AdamRates(rates, (0.9, 0.95), 1e-8, "cpu")
    for used in (torch.arange(ROWS), torch.tensor([3])):
        rates.append(0.1)
        update_rows(window, slots[used], steps, torch.ones(len(used), DIM), None)
    resting = torch.arange(ROWS) != 3
    assert torch.allclose(window[slots[resting], DIM : 2 * DIM], torch.tensor(0.1))
    assert torch.allclose(window[slots[3], DIM : 2 * DIM], torch.tensor(0.19))
    seen = torch.zeros(ROWS, DIM)
    read_rows(window, slots, steps, seen, None)
    assert torch.equal(seen, window[slots, :DIM])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_matter(threads):
    torch.manual_seed(0)
    rows = 1500
    window, slots = torch.randn(rows, WORDS).abs(), torch.randperm(rows)
    versions(window).random_(0, 4)
    rates = RateHistory([1e-3] * 5)
    steps = AdamRates(rates, (0.9, 0.95), 1e-8, "cpu")
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            records, seen, caught_up = window.clone(), torch.zeros(rows, DIM), torch.zeros(rows, WORDS)
            read_rows(records, slots, steps, seen, caught_up)
            update_rows(records, slots, steps, seen, caught_up)
            results.append(torch.cat([records, seen], dim=1).view(torch.int32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_no_rows():
    steps = AdamRates(RateHistory([0.1]), (0.9, 0.95), 1e-8, "cpu")
    window, nothing = torch.zeros(3, WORDS), torch.zeros(0, dtype=torch.int64)
    read_rows(window, nothing, steps, torch.zeros(0, DIM), torch.zeros(0, WORDS))
    update_rows(window, nothing, steps, torch.zeros(0, DIM), torch.zeros(0, WORDS))
    assert not window.any()
