"""Optimizers with one number of state a row."""

import pytest
import torch

from kernels.rows.rowwise import decay, rowwise_adagrad, rowwise_rmsprop


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def adagrad(weights_UD, state_U1, grad_UD):
    rowwise_adagrad(weights_UD, state_U1, grad_UD, lr=0.1, eps=1e-8)


def rmsprop(weights_UD, state_U1, grad_UD):
    rowwise_rmsprop(weights_UD, state_U1, grad_UD, lr=0.01, beta2=0.9, eps=1e-8)


BOTH = pytest.mark.parametrize("update", [adagrad, rmsprop])


def formula(update, weights, state, grads):
    """The same step in float64."""
    mean_square = grads.double().square().mean(1, keepdim=True)
    if update is adagrad:
        state = state + mean_square
        return weights - 0.1 * grads.double() / (state.sqrt() + 1e-8), state
    state = 0.9 * state + 0.1 * mean_square
    return weights - 0.01 * grads.double() / (state.sqrt() + 1e-8), state


@BOTH
@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_a_step_follows_its_formula(update, dim):
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(6, dim + 2, generator=generator)
    records[:, dim] = 0.0
    weights, state = records[:, :dim].double(), torch.zeros(6, 1, dtype=torch.float64)
    spare = records[:, -1].clone()
    for _ in range(20):
        grads = torch.randn(6, dim, generator=generator)
        update(records[:, :dim], records[:, dim : dim + 1], grads)
        weights, state = formula(update, weights, state, grads)
    torch.testing.assert_close(records[:, :dim].double(), weights, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(records[:, dim : dim + 1].double(), state, rtol=1e-5, atol=0)
    assert torch.equal(records[:, -1], spare)


@BOTH
@pytest.mark.parametrize("dim", [3, 64, 80])
def test_a_row_is_updated_alike_in_any_company(update, dim):
    # A library's sum over columns would not: it picks its order of additions by the shape of the whole.
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(257, dim + 1, generator=generator).abs()
    grads = torch.randn(257, dim, generator=generator) * 100
    alone = records.clone()
    update(records[:, :dim], records[:, dim:], grads)
    for row in range(257):
        weights, state = alone[row : row + 1, :dim].clone(), alone[row : row + 1, dim:].clone()
        update(weights, state, grads[row : row + 1])
        alone[row, :dim], alone[row, dim:] = weights[0], state[0]
    assert same_bits(records, alone)


@BOTH
def test_weights_without_gradient_rest(update):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 4, generator=generator)
    state = torch.tensor([[0.0], [1e-40], [1.0], [3e38], [2.0]])
    before = weights.clone()
    update(weights, state, torch.zeros(5, 4))
    assert same_bits(weights, before)


def test_the_state_without_gradient_rests_under_adagrad():
    state = torch.tensor([[0.0], [0.3]])
    adagrad(torch.ones(2, 4), state, torch.zeros(2, 4))
    assert same_bits(state, torch.tensor([[0.0], [0.3]]))


def test_rmsprop_of_rows_of_one_column_is_pytorchs():
    generator = torch.Generator().manual_seed(0)
    weights, state = torch.randn(50, 1, generator=generator), torch.zeros(50, 1)
    dense = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.RMSprop([dense], lr=0.01, alpha=0.9, eps=1e-8, foreach=False)
    for _ in range(50):
        dense.grad = torch.randn(50, 1, generator=generator)
        rmsprop(weights, state, dense.grad)
        optimizer.step()
    torch.testing.assert_close(weights, dense.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [0.95, 0.4, 0.0])
def test_decay_has_the_bits_of_decaying_step_by_step(factor):
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(300, generator=generator) * 10 ** (torch.rand(300, generator=generator) * 80 - 40)
    values[::50] = 0.0
    times = torch.randint(-2, 400, (300,), generator=generator, dtype=torch.int32)
    times[:3] = 5000  # to the end: what is denormal then falls no further
    expected = values.clone()
    for done in range(5000):
        expected[times > done] *= factor
    assert same_bits(decay(values, times, factor), expected)


def test_decay_ends_where_nothing_changes_any_more():
    # Step by step, these would take days.
    values, times = torch.tensor([1.0, 1e-20, 0.0]), torch.tensor([2_000_000_000, 10**15, 10**15])
    assert same_bits(decay(values, times, 0.95), decay(values, times.clamp(max=10_000), 0.95))
    assert decay(values[:0], times[:0], 0.95).numel() == 0
