"""The Triton form of optimizers with one number of state a row has the bits of the reference."""

import pytest
import torch

from kernels.rows import rowwise as row_optimizer
from kernels.rows.records_triton import read_rows
from kernels.rows.row_update import RowUpdate
from kernels.rows.rowwise_triton import rowwise_adagrad, rowwise_rmsprop
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.kernels import exact_fma
from tests.kernels.own_process import compile_launches
from tests.kernels.row_records import (
    Table,
    far_apart,
    float_operations,
    same_bits,
    values_of_all_sizes,
    without_waiting_or_allocating,
)

STEP, LR, BETA2, EPS, SEED = 50, 3e-3, 0.95, 1e-8, 7
LAST = torch.tensor([49, 0, 1, 48, 49, 30, 0, 45], dtype=torch.int32)  # versions of rows before step 50
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adagrad", "rmsprop", "lazy rmsprop"])


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    exact_fma.install(monkeypatch)


def update(optimizer, *rows, step=STEP, **options):
    """The kernel, on records in slots."""
    given = RowUpdate(*rows, step=step, seed=SEED, **options)
    if optimizer == "adagrad":
        rowwise_adagrad(given, lr=LR, eps=EPS)
    else:
        rowwise_rmsprop(given, lr=LR, beta2=BETA2, eps=EPS, decays=optimizer == "rmsprop")


def expect(optimizer, weights, state, last, grad, step):
    """The reference, in place."""
    if optimizer == "adagrad":
        row_optimizer.rowwise_adagrad(weights, state, grad, lr=LR, eps=EPS)
        return
    if optimizer == "rmsprop":
        state[:, 0] = row_optimizer.decay(state[:, 0], step - 1 - last, BETA2)
    row_optimizer.rowwise_rmsprop(weights, state, grad, lr=LR, beta2=BETA2, eps=EPS)


def rows_of(dim, last, generator):
    """Weights, state and version: of all magnitudes or as in training; rows of version 0 have no state."""
    weights = torch.randn(len(last), dim, generator=generator) * 0.02
    weights[::3] = values_of_all_sizes(weights[::3].shape, -140, 10, generator)
    state = torch.rand(len(last), 1, generator=generator) * 1e-6
    state[1::2] = values_of_all_sizes(state[1::2].shape, -149, 60, generator).abs()
    state[last == 0] = 0.0
    return weights, state, last


def check(device, optimizer, table, rows, *, step=STEP, scale=1.0, strided=False):
    """Updates the rows, and compares every record of the table with the reference."""
    generator = torch.Generator().manual_seed(2)
    weights, state, last = rows
    slots = table.place(*rows)
    weights = table.weights(table.records[slots])
    grad = torch.randn(weights.shape, generator=generator) * 10 ** torch.randn(len(last), 1, generator=generator)
    grad[1:2] = 0.0
    ids = torch.randint(0, 2**62, (len(last),), generator=generator)
    given = grad.to(device)
    if strided:
        given = torch.empty(table.dim, 2 * len(last), device=device).T[::2].copy_(grad)
    records = table.records.to(device, copy=True)
    there = records, slots.to(device), given, ids.to(device)
    update(optimizer, *there, step=step, bf16=table.bf16, gradient_scale=scale)

    state = state.clone()
    expect(optimizer, weights, state, last, grad * scale, step)
    if table.bf16:
        stochastic_round_bf16_(weights, ids, seed=SEED, step=step)
    after = Table(table.dim, 1, table.bf16, table.records.clone())
    after.fill(slots, weights, state, torch.full_like(last, step))
    assert same_bits(records, after.records)

    read = torch.full(weights.shape, torch.nan, device=device)
    read_rows(records, slots.to(device), read, bf16=table.bf16)
    assert same_bits(read, weights)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [1, 5, 64, 80])
@OPTIMIZERS
def test_rows_have_the_bits_of_the_reference(kernel_device, optimizer, dim, bf16):
    rows = rows_of(dim, LAST, torch.Generator().manual_seed(dim))
    check(kernel_device, optimizer, Table(dim, 1, bf16), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [64, 80, 240, 256, 320, 513, 1000, 1024])
@OPTIMIZERS
def test_many_rows_have_the_bits_of_the_reference(optimizer, dim, bf16):
    generator = torch.Generator().manual_seed(0)
    last = torch.randint(0, 400, (5001,), generator=generator, dtype=torch.int32)
    check(torch.device("cuda"), optimizer, Table(dim, 1, bf16), rows_of(dim, last, generator), step=400)


@pytest.mark.gpu
@OPTIMIZERS
def test_steps_neither_wait_nor_allocate(optimizer):
    table = Table(80, 1)
    slots = table.place(*rows_of(80, LAST, torch.Generator().manual_seed(0))).cuda()
    records, rows = table.records.cuda(), torch.zeros(len(LAST), 80, device="cuda")

    def run(step):
        read_rows(records, slots, rows)
        update(optimizer, records, slots, rows, step=step, gradient_scale=1 / step)

    run(STEP)
    with without_waiting_or_allocating():
        for step in range(STEP + 1, STEP + 6):
            run(step)


@pytest.mark.parametrize("dim", [2, 3, 13, 31, 240, 1000, 1023])
def test_sums_of_wide_rows_are_in_the_order_of_the_reference(kernel_device, dim):
    last = LAST[:3]
    check(kernel_device, "adagrad", Table(dim, 1), rows_of(dim, last, torch.Generator().manual_seed(dim)))


@OPTIMIZERS
def test_more_rows_than_one_program_has(kernel_device, optimizer):
    generator = torch.Generator().manual_seed(0)
    last = torch.randint(0, STEP, (70,), generator=generator, dtype=torch.int32)
    check(kernel_device, optimizer, Table(64, 1), rows_of(64, last, generator))


def test_gradients_are_scaled_first(kernel_device):
    rows = rows_of(5, LAST, torch.Generator().manual_seed(0))
    check(kernel_device, "adagrad", Table(5, 1), rows, scale=0.3)
    check(kernel_device, "rmsprop", Table(5, 1), rows, scale=0.3)


def test_gradients_of_any_strides(kernel_device):
    check(kernel_device, "rmsprop", Table(5, 1), rows_of(5, LAST, torch.Generator().manual_seed(0)), strided=True)


@OPTIMIZERS
def test_no_rows(kernel_device, optimizer):
    check(kernel_device, optimizer, Table(5, 1), rows_of(5, LAST[:0], torch.Generator().manual_seed(0)))


def test_decay_ends_where_nothing_changes_any_more(kernel_device):
    # Step by step, this would take days. One row of the block is at its end long before.
    last = torch.tensor([2_000_000_000, 5, 2_000_000_006], dtype=torch.int32)
    rows = (torch.ones(3, 4), torch.tensor([[1.0], [3e38], [1e-3]]), last)
    check(kernel_device, "rmsprop", Table(4, 1), rows, step=2_000_000_010)


def test_offsets_beyond_2_to_the_31(kernel_device):
    """Slots, and rows of gradients, that lie further apart than 32-bit offsets reach."""
    dim, words, stride, rows = 5, 7, 2**29, 6
    slots = torch.arange(rows) * (2**31 // words // 4)
    records = torch.randn(rows, words).abs()
    far_records = far_apart(int(slots[-1]) * words, words, kernel_device)[0].as_strided(
        (int(slots[-1]) + 1, words), (words, 1)
    )
    far_grad = far_apart((rows - 1) * stride, dim, kernel_device)[0].as_strided((rows, dim), (stride, 1))
    grad = torch.randn(rows, dim)
    far_grad.copy_(grad)
    far_records[slots.to(kernel_device)] = records.to(kernel_device)
    update("adagrad", far_records, slots.to(kernel_device), far_grad)
    update("adagrad", records, torch.arange(rows), grad)
    assert same_bits(far_records[slots.to(kernel_device)], records)
    read_rows(far_records, slots.to(kernel_device), far_grad)
    assert same_bits(far_grad, records[:, :dim])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": torch.zeros(4, 8)}, "7 words"),
        ({"records": torch.zeros(4, 7, dtype=torch.bfloat16)}, "float32"),
        ({"slots": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"grad": torch.zeros(2, 5, dtype=torch.bfloat16)}, "2 rows of float32"),
        ({"bf16": True, "records": torch.zeros(4, 5)}, "ids"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"records": torch.zeros(4, 7), "slots": torch.tensor([1, 2]), "grad": torch.zeros(2, 5), "bf16": False}
    given |= change
    with pytest.raises(ValueError, match=message):
        update("adagrad", given["records"], given["slots"], given["grad"], bf16=given["bf16"])


def compiled_calls():
    """Launches of every form, each at two steps that nothing may be compiled anew for, with slots from anywhere."""
    slots, ids = torch.arange(40), torch.arange(40)
    for dim, bf16 in ((80, True), (256, False)):
        records, grad = torch.zeros(40, Table(dim, 1, bf16).records.shape[1]), torch.zeros(40, dim)
        for step, start, end, scale in ((1, 0, 16, 1.0), (48, 1, 34, 0.5)):
            given = (records, slots[start:end], grad[: end - start], ids[start:end])
            update("adagrad", *given, step=step, bf16=bf16, gradient_scale=scale)
            update("rmsprop", *given, step=step, bf16=bf16, gradient_scale=scale)
            read_rows(records, slots[start:end], grad[: end - start], bf16=bf16)


def test_what_is_compiled_for_a_gpu_rounds_as_written():
    launches = compile_launches(compiled_calls)
    assert len(launches) == 2 * 2 * 3
    for start in range(0, len(launches), 2 * 3):
        assert launches[start : start + 3] == launches[start + 3 : start + 2 * 3]
        adagrad, rmsprop, read = (float_operations(ptx) for _, ptx in launches[start : start + 3])
        # No denormal is flushed, and nothing fused but the sum of RMSprop.
        assert all(operation.endswith(".rn.f32") for operation in adagrad + rmsprop)
        assert "fma.rn.f32" not in adagrad
        assert rmsprop.count("fma.rn.f32") == rmsprop.count("sqrt.rn.f32") > 0
        assert not read
