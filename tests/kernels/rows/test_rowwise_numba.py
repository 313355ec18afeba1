"""The compiled pass of optimizers with one number of state a row has the bits of the reference."""

import pytest
import torch
from torch import Tensor

from kernels.rows import rowwise
from kernels.rows.row_update import RowUpdate
from kernels.rows.rowwise_numba import rowwise_adagrad, rowwise_rmsprop
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.kernels.row_records import Table, same_bits, values_of_all_sizes

STEP, LR, BETA2, EPS, SEED = 50, 3e-3, 0.95, 1e-8, 7
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adagrad", "rmsprop", "lazy rmsprop"])
DTYPES = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
Rows = tuple[Tensor, Tensor, Tensor]


def update(optimizer: str, *rows: Tensor, step: int = STEP, bf16: bool = False, scale: float = 1.0) -> None:
    """The compiled pass, on records in slots."""
    given = RowUpdate(*rows, step=step, bf16=bf16, seed=SEED, gradient_scale=scale)
    if optimizer == "adagrad":
        rowwise_adagrad(given, lr=LR, eps=EPS)
    else:
        rowwise_rmsprop(given, lr=LR, beta2=BETA2, eps=EPS, decays=optimizer == "rmsprop")


def expect(optimizer: str, weights: Tensor, state: Tensor, last: Tensor, grad: Tensor, step: int) -> None:
    """The reference, in place."""
    if optimizer == "adagrad":
        rowwise.rowwise_adagrad(weights, state, grad, lr=LR, eps=EPS)
        return
    if optimizer == "rmsprop":
        state[:, 0] = rowwise.decay(state[:, 0], step - 1 - last, BETA2)
    rowwise.rowwise_rmsprop(weights, state, grad, lr=LR, beta2=BETA2, eps=EPS)


def rows_of(count: int, dim: int) -> Rows:
    """Weights, state and version: of all magnitudes or as in training; rows of version 0 have no state."""
    generator = torch.Generator().manual_seed(dim)
    last = torch.randint(0, STEP, (count,), generator=generator, dtype=torch.int32)
    last[:2] = torch.tensor([0, STEP - 1])
    weights = torch.randn(count, dim, generator=generator) * 0.02
    weights[::3] = values_of_all_sizes(weights[::3].shape, -140, 10, generator)
    state = torch.rand(count, 1, generator=generator) * 1e-6
    state[1::2] = values_of_all_sizes(state[1::2].shape, -149, 60, generator).abs()
    state[last == 0] = 0.0
    return weights, state, last


def check(optimizer: str, rows: Rows, bf16: bool = False, scale: float = 1.0, step: int = STEP) -> None:
    """Updates the rows, and compares every record of the table with the reference."""
    weights, state, last = rows
    generator = torch.Generator().manual_seed(2)
    table = Table(weights.shape[1], 1, bf16)
    slots = table.place(*rows)
    weights, state = table.weights(table.records[slots]), state.clone()
    grad = torch.randn(weights.shape, generator=generator) * 10 ** torch.randn(len(last), 1, generator=generator)
    grad[1::5] = 0.0
    ids, records = torch.randint(0, 2**62, (len(last),), generator=generator), table.records.clone()
    update(optimizer, records, slots, grad, ids, step=step, bf16=bf16, scale=scale)
    expect(optimizer, weights, state, last, grad * scale, step)
    if bf16:
        stochastic_round_bf16_(weights, ids, seed=SEED, step=step)
    table.fill(slots, weights, state, torch.full_like(last, step))
    assert same_bits(records, table.records)


@DTYPES
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 13, 64, 80])
@OPTIMIZERS
def test_rows_have_the_bits_of_the_reference(optimizer: str, dim: int, bf16: bool) -> None:
    check(optimizer, rows_of(60, dim), bf16)


@OPTIMIZERS
def test_gradients_are_scaled_first(optimizer: str) -> None:
    check(optimizer, rows_of(20, 7), scale=0.3)


@OPTIMIZERS
def test_more_rows_than_one_thread_takes(optimizer: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(optimizer, rows_of(1500, 7))
    finally:
        torch.set_num_threads(before)


@OPTIMIZERS
def test_no_rows(optimizer: str) -> None:
    check(optimizer, tuple(part[:0] for part in rows_of(8, 5)))  # type: ignore[arg-type]


def test_decay_ends_where_nothing_changes_any_more() -> None:
    # Step by step, this would take minutes.
    last = torch.tensor([2_000_000_000, 5, 6, 7, 8], dtype=torch.int32)
    state = torch.tensor([[1.0], [3e38], [0.0], [1e-43], [torch.inf]])
    check("rmsprop", (torch.ones(5, 4), state, last), step=2_000_000_010)


@OPTIMIZERS
def test_bf16_rows_without_ids_are_refused(optimizer: str) -> None:
    with pytest.raises(ValueError, match="rounded by their ids, but none are given"):
        update(optimizer, torch.zeros(3, 5), torch.arange(2), torch.zeros(2, 5), bf16=True)
