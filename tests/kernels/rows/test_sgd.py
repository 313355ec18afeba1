"""The compiled pass of SGD over records has the bits of its formula in PyTorch, operation by operation."""

import pytest
import torch
from torch import Tensor

from kernels.gather.values import RowValues
from kernels.rows.row_update import RowUpdate
from kernels.rows.sgd import sgd
from kernels.rows.sgd_numba import update_rows
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.kernels.row_records import Table, same_bits, values_of_all_sizes

STEP, LR, SEED = 50, 3e-3, 7
DTYPES = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def rows_of(count: int, dim: int) -> tuple[Tensor, Tensor]:
    """Weights and gradients of all magnitudes, with infinities among the gradients."""
    generator = torch.Generator().manual_seed(dim)
    weights = values_of_all_sizes(torch.Size([count, dim]), -140, 10, generator)
    grad = values_of_all_sizes(torch.Size([count, dim]), -140, 20, generator)
    grad[1::7] = 0.0
    grad[3::7, 0] = torch.inf
    return weights, grad


def placed(bf16: bool, weights: Tensor) -> tuple[Table, Tensor]:
    table = Table(weights.shape[1], 0, bf16)
    slots = table.place(weights, torch.zeros(len(weights), 0), torch.arange(len(weights)))
    return table, slots


@DTYPES
@pytest.mark.parametrize("dim", [1, 2, 5, 64, 80])
def test_rows_have_the_bits_of_the_formula(dim: int, bf16: bool) -> None:
    weights, grad = rows_of(40, dim)
    table, slots = placed(bf16, weights)
    weights, records, ids = table.weights(table.records[slots]), table.records.clone(), slots * 2**40 + 5
    update_rows(RowUpdate(records, slots, grad, ids, step=STEP, bf16=bf16, seed=SEED, gradient_scale=0.3), lr=LR)
    weights = weights - grad * 0.3 * LR
    if bf16:
        stochastic_round_bf16_(weights, ids, seed=SEED, step=STEP)
    table.fill(slots, weights, torch.zeros(len(slots), 0), torch.full((len(slots),), STEP))
    assert same_bits(records, table.records)
    assert same_bits(RowValues(records, slots, weights[:0], bf16).tensor(), weights)


def test_the_reference_has_the_bits_of_the_formula() -> None:
    weights, grad = rows_of(40, 5)
    for scratch in (None, torch.empty(40, 5)):
        stepped = weights.clone()
        sgd(stepped, grad, lr=LR, scratch_UD=scratch)
        assert same_bits(stepped, weights - grad * LR)


@DTYPES
def test_what_is_not_a_number_stays_none(bf16: bool) -> None:
    table, slots = placed(bf16, torch.ones(3, 6))
    grad = torch.zeros(3, 6)
    grad[1, 4] = torch.nan
    grad.view(torch.int32)[2, 3] = 0x7F800001  # a payload that bfloat16 has no room for
    update_rows(RowUpdate(table.records, slots, grad, slots, step=1, bf16=bf16), lr=LR)
    assert torch.equal(table.weights(table.records[slots]).isnan(), grad.isnan())


@DTYPES
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_matter(threads: int, bf16: bool) -> None:
    weights, grad = rows_of(1500, 6)
    table, slots = placed(bf16, weights)
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(table.records.clone())
            update_rows(RowUpdate(results[-1], slots, grad, slots, step=1, bf16=bf16), lr=LR)
    finally:
        torch.set_num_threads(before)
    assert same_bits(*results)


@DTYPES
def test_no_rows(bf16: bool) -> None:
    records, nothing = torch.zeros(3, 4 if bf16 else 6), torch.zeros(0, dtype=torch.int64)
    update_rows(RowUpdate(records, nothing, torch.zeros(0, 5), nothing, step=1, bf16=bf16), lr=LR)
    assert not records.any()


def test_bf16_rows_without_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="rounded by their ids, but none are given"):
        update_rows(RowUpdate(torch.zeros(3, 4), torch.arange(2), torch.zeros(2, 5), step=1, bf16=True), lr=LR)
