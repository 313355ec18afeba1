"""The Triton form of SGD on records has the bits of the reference."""

import pytest
import torch

from kernels.rows.records_triton import read_rows
from kernels.rows.row_update import RowUpdate
from kernels.rows.sgd import sgd
from kernels.rows.sgd_triton import update_rows
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.kernels.own_process import compile_launches
from tests.kernels.row_records import (
    Table,
    float_operations,
    same_bits,
    values_of_all_sizes,
    without_waiting_or_allocating,
)

STEP, LR, SEED = 50, 3e-3, 7
DTYPES = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


def check(device, dim, count, bf16, scale=1.0, strided=False):
    """Updates rows, and compares every record of the table with the reference."""
    generator = torch.Generator().manual_seed(dim)
    weights = values_of_all_sizes(torch.Size([count, dim]), -140, 10, generator)
    grad = values_of_all_sizes(torch.Size([count, dim]), -140, 20, generator)
    grad[1:2] = 0.0
    table = Table(dim, 0, bf16)
    slots = table.place(weights, torch.zeros(count, 0), torch.arange(count))
    weights, ids = table.weights(table.records[slots]), torch.randint(0, 2**62, (count,), generator=generator)
    given, records = grad.to(device), table.records.to(device, copy=True)
    if strided:
        given = torch.empty(dim, 2 * count, device=device).T[::2].copy_(grad)
    rows = records, slots.to(device), given, ids.to(device)
    update_rows(RowUpdate(*rows, step=STEP, bf16=bf16, seed=SEED, gradient_scale=scale), lr=LR)

    sgd(weights, grad * scale, lr=LR)
    if bf16:
        stochastic_round_bf16_(weights, ids, seed=SEED, step=STEP)
    table.fill(slots, weights, torch.zeros(count, 0), torch.full((count,), STEP))
    assert same_bits(records, table.records)
    read = torch.full(weights.shape, torch.nan, device=device)
    read_rows(records, slots.to(device), read, bf16=bf16)
    assert same_bits(read, weights)


@DTYPES
@pytest.mark.parametrize(("dim", "count"), [(1, 7), (5, 7), (64, 70), (80, 40), (5, 0)])
def test_rows_have_the_bits_of_the_reference(kernel_device, dim, count, bf16):
    check(kernel_device, dim, count, bf16)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("dim", [64, 80, 240, 513, 1024])
def test_many_rows_have_the_bits_of_the_reference(dim, bf16):
    check(torch.device("cuda"), dim, 5001, bf16)


def test_gradients_are_scaled_first(kernel_device):
    check(kernel_device, 5, 9, False, scale=0.3)


def test_gradients_of_any_strides(kernel_device):
    check(kernel_device, 5, 9, False, strided=True)


@pytest.mark.gpu
def test_steps_neither_wait_nor_allocate():
    records, slots = torch.zeros(20, 81, device="cuda"), torch.arange(8, device="cuda")
    grad = torch.zeros(8, 80, device="cuda")
    update_rows(RowUpdate(records, slots, grad, step=1), lr=LR)
    with without_waiting_or_allocating():
        for step in range(2, 7):
            update_rows(RowUpdate(records, slots, grad, step=step, gradient_scale=1 / step), lr=LR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": torch.zeros(4, 7)}, "6 words"),
        ({"slots": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"bf16": True, "records": torch.zeros(4, 4)}, "ids"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"records": torch.zeros(4, 6), "slots": torch.tensor([1, 2]), "bf16": False} | change
    with pytest.raises(ValueError, match=message):
        update_rows(RowUpdate(given["records"], given["slots"], torch.zeros(2, 5), step=1, bf16=given["bf16"]), lr=LR)


def compiled_calls():
    """Launches of each form, at two steps that nothing may be compiled anew for, with slots from anywhere."""
    slots = torch.arange(40)
    for dim, bf16 in ((80, True), (256, False)):
        records, grad = torch.zeros(40, Table(dim, 0, bf16).records.shape[1]), torch.zeros(40, dim)
        for step, start, end, scale in ((1, 0, 16, 1.0), (48, 1, 34, 0.5)):
            rows = records, slots[start:end], grad[: end - start], slots[start:end]
            update_rows(RowUpdate(*rows, step=step, bf16=bf16, gradient_scale=scale), lr=LR)


def test_what_is_compiled_for_a_gpu_rounds_as_written():
    launches = compile_launches(compiled_calls)
    assert len(launches) == 4
    assert launches[0] == launches[1]
    assert launches[2] == launches[3]
    for _, ptx in launches[::2]:
        operations = float_operations(ptx)
        # No denormal is flushed, and nothing fused.
        assert operations
        assert all(operation in ("mul.f32", "mul.rn.f32", "sub.f32", "sub.rn.f32") for operation in operations)
