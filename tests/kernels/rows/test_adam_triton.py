"""The Triton form of Adam on rows has the bits of the reference."""

import functools

import pytest
import torch
import triton.language as tl

from kernels.rows.adam import adam, replay_adam
from kernels.rows.adam_closed import GapSums, close_gaps
from kernels.rows.adam_rates import AdamRates
from kernels.rows.adam_triton import read_rows, update_rows
from kernels.rows.caught_up import CaughtUp
from kernels.rows.rate_history import RateHistory
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.grid import grid
from tests.kernels import exact_fma
from tests.kernels.own_process import columns_side_by_side, compile_launches, resources_of_launches
from tests.kernels.row_records import (
    Table,
    far_apart,
    float_operations,
    same_bits,
    values_of_all_sizes,
    without_waiting_or_allocating,
)
from tests.kernels.rows.resting import each_resting

USUAL = ((0.9, 0.95), 1e-8)


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    return exact_fma.install(monkeypatch)


def rates_of(steps):
    """Warm-up, then ups and downs: the largest is not the first."""
    return [1e-3 * min(step, 50) / 50 * (1 + 0.5 * (step % 7)) for step in range(1, steps + 1)]


def states(table, last_steps, generator):
    """Rows after their last steps, of all magnitudes or as in training; those of version 0 have no moments."""
    rows, dim = len(last_steps), table.dim
    weights, moments = torch.randn(rows, dim, generator=generator) * 0.02, torch.zeros(2, rows, dim)
    moments[0] = torch.randn(rows, dim, generator=generator) * 1e-4
    moments[1] = torch.rand(rows, dim, generator=generator) * 1e-7
    weights[::3] = values_of_all_sizes(weights[::3].shape, -140, 10, generator)
    moments[0, 1::2] = values_of_all_sizes(moments[0, 1::2].shape, -149, 20, generator)
    moments[1, 1::2] = values_of_all_sizes(moments[1, 1::2].shape, -149, 20, generator).abs()
    moments[0, :, ::4] = 0.0
    moments[:, last_steps == 0] = 0.0
    return weights, torch.cat([*moments], dim=1), last_steps


def room(rows, dim, device="cpu", catches_up=True):
    state = torch.full((rows, 2 * dim), torch.nan, device=device) if catches_up else None
    return CaughtUp(torch.full((rows, dim), torch.nan, device=device), state)


def expected_rows(parts, betas, eps, history, untouched):
    """Weights and moments after all missed steps, in the order of the rows."""
    weights, state, last = parts
    weights, (means, squares) = weights.clone(), state.clone().chunk(2, dim=1)
    behind = ((last > 0) & (last < len(history))).nonzero().flatten()
    if untouched != "lazy" and len(behind):
        behind = behind[last[behind].argsort(stable=True)]
        taken = [part[behind] for part in (weights, means, squares)]
        if untouched == "closed":
            close_gaps(*taken, last[behind].tolist(), GapSums(history, betas, eps, "cpu"))
        else:
            replay_adam(*taken, last[behind].tolist(), history, betas=betas, eps=eps)
        for part, values in zip((weights, means, squares), taken, strict=True):
            part[behind] = values
    return weights, means, squares


def check(device, table, parts, steps, *, betas, eps, untouched="exact", scale=1.0, seed=3, strided=False):
    """Reads and updates the rows and compares every record of the table with the reference."""
    generator = torch.Generator().manual_seed(2)
    rows = len(parts[0])
    slots = table.place(*parts)
    parts = table.weights(table.records[slots]), table.state(table.records[slots]), parts[2]
    history = RateHistory(rates_of(steps))
    rates = AdamRates(history, betas, eps, device, capacity=8, closed=untouched == "closed")
    records, slots_there = table.records.to(device, copy=True), slots.to(device)

    got = room(rows, table.dim, device, untouched != "lazy")
    dtypes = {"bf16": table.bf16, "bf16_state": table.bf16_state}
    read_rows(records, slots_there, rates, got, **dtypes)
    expected = expected_rows(parts, betas, eps, history, untouched)
    assert same_bits(got.weights_UD, expected[0])
    assert got.state_US is None or same_bits(got.state_US, torch.cat(expected[1:], dim=1))
    assert same_bits(records, table.records)

    grad = torch.randn(rows, table.dim, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    grad[1:2] = 0.0
    ids = torch.randint(0, 2**62, (rows,), generator=generator)
    lr = 2e-3
    history.append(lr)
    given = grad.to(device)
    if strided:
        given = torch.empty(table.dim, 2 * rows, device=device).T[::2].copy_(grad)
    there = records, slots_there, given, ids.to(device)
    update_rows(RowUpdate(*there, step=len(history), **dtypes, seed=seed, gradient_scale=scale), rates, got)
    grad *= scale
    adam(*expected, grad, step=len(history), lr=lr, betas=betas, eps=eps)
    if table.bf16:
        stochastic_round_bf16_(expected[0], ids, seed=seed, step=len(history))
    moments = torch.cat(expected[1:], dim=1)
    if table.bf16_state:
        stochastic_round_bf16_(moments, ids, seed=seed, step=len(history), part="state")
    after = Table(table.dim, 2 * table.dim, table.bf16, table.records.clone(), bf16_state=table.bf16_state)
    after.fill(slots, expected[0], moments, torch.full((rows,), len(history)))
    assert same_bits(records, after.records)


LAST = torch.tensor([50, 0, 1, 47, 50, 33, 0, 49], dtype=torch.int32)  # versions of rows at step 50


IN_BF16 = [(False, False), (True, False), (False, True), (True, True)]
"""Rows, and their state."""
DTYPES = pytest.mark.parametrize(("bf16", "bf16_state"), IN_BF16)


@pytest.mark.parametrize(("dim", "dtypes"), grid([1, 5, 80], IN_BF16))
def test_rows_have_the_bits_of_the_reference(kernel_device, dim, dtypes):
    betas, eps = USUAL
    table = Table(dim, 2 * dim, dtypes[0], bf16_state=dtypes[1])
    check(kernel_device, table, states(table, LAST, torch.Generator().manual_seed(dim)), 50, betas=betas, eps=eps)


@pytest.mark.parametrize(
    ("betas", "eps"),
    [((0.9, 0.999), 1e-8), ((0.4, 0.999), 1e-20), ((0.99, 0.9), 1e-8), ((0.0, 0.0), 1e-3), ((0.5, 0.25), 1e-8)],
    ids=["usual", "from the far end", "first moment outlives the second", "no memory", "half"],
)
def test_other_settings_have_the_bits_of_the_reference(kernel_device, betas, eps):
    table = Table(13, 26)
    check(kernel_device, table, states(table, LAST, torch.Generator().manual_seed(0)), 50, betas=betas, eps=eps)


@DTYPES
def test_lazy_rows_are_not_replayed(kernel_device, bf16, bf16_state):
    betas, eps = USUAL
    table = Table(6, 12, bf16, bf16_state=bf16_state)
    parts = states(table, LAST, torch.Generator().manual_seed(0))
    check(kernel_device, table, parts, 50, betas=betas, eps=eps, untouched="lazy")


@DTYPES
def test_closed_gaps_have_the_bits_of_the_reference(kernel_device, bf16, bf16_state):
    table = Table(6, 12, bf16, bf16_state=bf16_state)
    parts = states(table, LAST, torch.Generator().manual_seed(0))
    check(kernel_device, table, parts, 50, betas=(0.9, 0.95), eps=1e-8, untouched="closed")


def test_a_long_gap_takes_no_more_operations_than_a_short_one(kernel_device, monkeypatch):
    if kernel_device.type == "cuda":
        pytest.skip("no look into what a GPU computes")
    quotients, plain = [], tl.div_rn

    @functools.wraps(plain)
    def noted(*operands, **given):
        quotients.append(None)
        return plain(*operands, **given)

    monkeypatch.setattr(tl, "div_rn", noted)
    counts = []
    for steps in (10, 1000):
        table = Table(5, 10)
        parts = states(table, torch.tensor([1, 2], dtype=torch.int32), torch.Generator().manual_seed(0))
        check(kernel_device, table, parts, steps, betas=(0.9, 0.95), eps=1e-8, untouched="closed")
        counts.append(len(quotients))
        quotients.clear()
    assert 0 < counts[1] <= counts[0]


def test_gradients_are_scaled_first(kernel_device):
    betas, eps = USUAL
    table = Table(5, 10)
    parts = states(table, LAST, torch.Generator().manual_seed(0))
    check(kernel_device, table, parts, 50, betas=betas, eps=eps, scale=0.3)


def test_gradients_of_any_strides(kernel_device):
    betas, eps = USUAL
    table = Table(5, 10)
    parts = states(table, LAST, torch.Generator().manual_seed(0))
    check(kernel_device, table, parts, 50, betas=betas, eps=eps, strided=True)


def test_no_rows(kernel_device):
    betas, eps = USUAL
    table = Table(5, 10)
    check(kernel_device, table, states(table, LAST[:0], torch.Generator().manual_seed(0)), 3, betas=betas, eps=eps)


@pytest.mark.parametrize(
    ("betas", "eps", "steps"),
    [
        ((0.4, 0.5), 1e-8, 20_000),
        ((0.6, 0.5), 2.0**-62, 20_000),
        ((0.99, 0.9), 1e-8, 130),  # never at rest
        pytest.param((0.9, 0.95), 1e-8, 20_000, marks=pytest.mark.gpu),
        pytest.param((0.99, 0.9), 1e-8, 20_000, marks=pytest.mark.gpu),
    ],
)
def test_long_gaps(kernel_device, fused, betas, eps, steps):
    """Replays end early, where they may, with the bits of the reference."""
    table = Table(7, 14)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 7, generator=generator) * 0.02
    moments = torch.randn(2, 14, generator=generator) * 1e-3
    moments[:, 7:] **= 2
    moments[:, 3] = 0.0
    check(kernel_device, table, (weights, moments, torch.tensor([1, 100])), steps, betas=betas, eps=eps)
    assert len(fused) < 2 * 400 + 2 * 2  # in the interpreter: the steps are replayed once, by the read


def test_rows_that_were_never_updated_are_not_replayed(kernel_device, fused):
    table = Table(3, 6)
    slots = table.place(torch.randn(2, 3), torch.zeros(2, 6), torch.zeros(2)).to(kernel_device)
    records, got = table.records.to(kernel_device), room(2, 3, kernel_device)
    rates = AdamRates(RateHistory(rates_of(40)), *USUAL, kernel_device)
    read_rows(records, slots, rates, got)
    assert same_bits(got.weights_UD, records[slots, :3])
    assert not fused


@pytest.mark.gpu
def test_steps_neither_wait_nor_allocate():
    table, generator = Table(80, 160), torch.Generator().manual_seed(0)
    slots = table.place(*states(table, LAST, generator)).cuda()
    history = RateHistory(rates_of(50))
    records, rows = table.records.cuda(), torch.zeros(len(LAST), 80, device="cuda")
    rates, got = AdamRates(history, *USUAL, "cuda"), room(len(LAST), 80, "cuda")

    def step():
        read_rows(records, slots, rates, got)
        history.append(1e-3)
        update_rows(RowUpdate(records, slots, rows, step=len(history), gradient_scale=1 / len(history)), rates, got)

    step()
    with without_waiting_or_allocating():
        for _ in range(5):
            step()


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim", [64, 80, 240, 320, 1024])
def test_many_rows_have_the_bits_of_the_reference(dim, bf16):
    betas, eps = USUAL
    generator, table = torch.Generator().manual_seed(0), Table(dim, 2 * dim, bf16)
    last = torch.randint(0, 400, (5000,), generator=generator, dtype=torch.int32)
    check(torch.device("cuda"), table, states(table, last, generator), 400, betas=betas, eps=eps)


@each_resting
def test_a_row_rests_only_where_no_later_step_changes_it(kernel_device, weight, exp_avg, exp_avg_sq, lr, betas, eps):
    record = torch.tensor([[weight, exp_avg, exp_avg_sq]]).repeat_interleave(4, dim=1)
    history = RateHistory([lr] * 299 + [0.0])  # the last rate tells nothing of those before
    table = Table(4, 8)
    slots = table.place(record[:, :4], record[:, 4:], torch.tensor([100]))
    got = room(1, 4, kernel_device)
    rates = AdamRates(history, betas, eps, kernel_device)
    read_rows(table.records.to(kernel_device), slots.to(kernel_device), rates, got)
    expected = record.clone()
    replay_adam(*expected.split(4, dim=1), [100], history, betas=betas, eps=eps)
    assert same_bits(torch.cat(got[:2], dim=1), expected)


def test_offsets_beyond_2_to_the_31(kernel_device):
    """Slots, and rows of gradients, that lie further apart than 32-bit offsets reach."""
    betas, eps = USUAL
    words, dim = 3 * 5 + 1, 5
    far = (2**31 // words + 1) * words
    near, there = far_apart(far, words, kernel_device)
    table = Table(dim, 2 * dim)
    slots = table.place(*states(table, torch.tensor([3]), torch.Generator().manual_seed(0)))
    record = table.records[slots]
    there.copy_(record[0])
    near_records, slots = near.view(-1, words), torch.tensor([far // words], device=kernel_device)
    rates = AdamRates(RateHistory(rates_of(5)), betas, eps, kernel_device)
    grad = torch.ones(1, dim, device=kernel_device)
    small = record.to(kernel_device, copy=True)
    for records, places in ((near_records, slots), (small, torch.zeros_like(slots))):
        got = room(1, dim, kernel_device)
        read_rows(records, places, rates, got)
        update_rows(RowUpdate(records, places, grad, step=5), rates, got)
    assert same_bits(there, small[0])
    assert not same_bits(there, record[0])


def test_gradients_and_weights_beyond_2_to_the_31(kernel_device):
    betas, eps = USUAL
    dim, rows, stride = 3, 6, 2**29
    spread = far_apart((rows - 1) * stride, 3 * dim, kernel_device)[0].as_strided((rows, 3 * dim), (stride, 1))
    grad = torch.randn(rows, dim)
    table = Table(dim, 2 * dim)
    slots = table.place(*states(table, torch.arange(rows, dtype=torch.int32), torch.Generator().manual_seed(0)))
    rates = AdamRates(RateHistory(rates_of(7)), betas, eps, kernel_device)
    results = []
    for memory in (spread, torch.empty(rows, 3 * dim, device=kernel_device)):
        records = table.records.to(kernel_device, copy=True)
        got = CaughtUp(memory[:, :dim], memory[:, dim:])
        read_rows(records, slots.to(kernel_device), rates, got)
        read = memory.clone()
        there = records, slots.to(kernel_device)
        update_rows(RowUpdate(*there, grad.to(kernel_device), step=7), rates, got)
        memory[:, :dim] = grad  # as gradients, memory that far apart must do as well
        update_rows(RowUpdate(*there, memory[:, :dim], step=7), rates, CaughtUp(*read.split((dim, 2 * dim), 1)))
        results.append((records, read))
    for far, close in zip(*results, strict=True):
        assert same_bits(far, close)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": torch.zeros(4, 17)}, "16 words"),
        ({"records": torch.zeros(4, 16, dtype=torch.float64)}, "float32"),
        ({"records": torch.zeros(16, 4).T}, "contiguous"),
        ({"slots": torch.tensor([1, 2], dtype=torch.int32)}, "int64"),
        ({"grad": torch.zeros(3, 5)}, "2 rows"),
        ({"bf16": True, "records": torch.zeros(4, 14)}, "ids"),
        ({"bf16_state": True, "records": torch.zeros(4, 11)}, "ids"),
        ({"bf16_state": True}, "11 words"),
        ({"bf16": True, "records": torch.zeros(4, 14), "ids": torch.zeros(3, dtype=torch.int64)}, "2 row ids"),
        ({"got": room(2, 4)}, r"\[2, 5\], not torch.float32 \[2, 4\]"),
        ({"got": room(3, 5)}, r"\[2, 5\], not torch.float32 \[3, 5\]"),
        ({"got": CaughtUp(torch.zeros(2, 5), torch.zeros(2, 5))}, r"\[2, 10\], not torch.float32 \[2, 5\]"),
        ({"got": CaughtUp(torch.zeros(2, 5), torch.zeros(10, 2).T)}, "contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    given = {"records": torch.zeros(4, 16), "slots": torch.tensor([1, 2]), "grad": torch.zeros(2, 5), "ids": None}
    given |= {"got": room(2, 5), "bf16": False, "bf16_state": False} | change
    rates = AdamRates(RateHistory([1e-3]), *USUAL, "cpu")
    dtypes = {name: given[name] for name in ("bf16", "bf16_state")}
    update = RowUpdate(given["records"], given["slots"], given["grad"], given["ids"], step=1, **dtypes)
    with pytest.raises(ValueError, match=message):
        update_rows(update, rates, given["got"])


# No idle columns, of which the compiler may leave parts.
COMPILED = ((64, True, False), (1024, False, True), (1024, False, False), (64, True, True))


def compiled_calls(forms):
    """Launches of these forms, each at two steps that nothing may be compiled anew for, with slots from anywhere."""
    slots, ids = torch.arange(40), torch.arange(40)
    for dim, bf16, bf16_state in forms:
        words = Table(dim, 2 * dim, bf16, bf16_state=bf16_state).records.shape[1]
        records, grad = torch.zeros(40, words), torch.zeros(40, dim)
        dtypes = {"bf16": bf16, "bf16_state": bf16_state}
        for step, start, end, scale in ((1, 0, 16, 1.0), (48, 1, 34, 0.5)):
            rates = AdamRates(RateHistory(rates_of(step)), *USUAL, "cpu")
            given, count = (records, slots[start:end], rates), end - start
            exact, lazy = room(count, dim), room(count, dim, catches_up=False)
            read_rows(*given, exact, **dtypes)
            closed = AdamRates(RateHistory(rates_of(step)), *USUAL, "cpu", closed=True)
            read_rows(records, slots[start:end], closed, exact, **dtypes)
            rows = records, slots[start:end], grad[:count], ids[start:end]
            update = RowUpdate(*rows, step=step, **dtypes, gradient_scale=scale)
            update_rows(update, rates, lazy)
            update_rows(update, rates, exact)


@pytest.mark.parametrize("forms", [COMPILED[:2], pytest.param(COMPILED, marks=pytest.mark.long)], ids=len)
def test_what_is_compiled_for_a_gpu_rounds_as_written(forms):
    launches = compile_launches(functools.partial(compiled_calls, forms))
    assert len(launches) == len(forms) * 2 * 4
    for start in range(0, len(launches), 2 * 4):
        read, closed, lazy, exact = launches[start : start + 4]
        assert [read, closed, lazy, exact] == launches[start + 4 : start + 2 * 4]
        columns = float_operations(lazy[1]).count("sqrt.rn.f32")  # that a thread has
        assert columns > 0
        for (_, ptx), fused in ((read, 2), (closed, 0), (lazy, 2), (exact, 2)):
            operations = float_operations(ptx)
            # No denormal is flushed, and nothing fused that is not meant to be; the bound of steps may be a rough one.
            rough = {operation for operation in operations if not operation.endswith(".rn.f32")}
            assert rough <= {"ex2.approx.ftz.f32", "div.full.f32"}
            assert operations.count("fma.rn.f32") == fused * columns


# With 64 registers, all 32 programs fit that an H100's processor can have at a time; with 72, to round bf16 moments,
# 28 do.
REGISTERS = {
    (False, False): (64, 64, 64),
    (True, True): (64, 64, 64),
    (False, True): (64, 64, 72),
    (True, False): (64, 64, 64),
}
each_dtypes = pytest.mark.parametrize(
    "dtypes", [[*REGISTERS][:2], pytest.param([*REGISTERS], marks=pytest.mark.long)], ids=len
)


def adam_of_80_columns(dtypes):
    """A read and an update of records whose words are aligned to themselves alone, and of bf16 ones."""
    slots = torch.arange(40)
    for bf16, bf16_state in dtypes:
        words = Table(80, 160, bf16, bf16_state=bf16_state).records.shape[1]
        records, grad = torch.zeros(40, words), torch.zeros(40, 80)
        rates, closed = (AdamRates(RateHistory(rates_of(3)), *USUAL, "cpu", closed=closed) for closed in (False, True))
        got = room(40, 80)
        read_rows(records, slots, closed, got, bf16=bf16, bf16_state=bf16_state)
        read_rows(records, slots, rates, got, bf16=bf16, bf16_state=bf16_state)
        update_rows(RowUpdate(records, slots, grad, slots, step=3, bf16=bf16, bf16_state=bf16_state), rates, got)


@each_dtypes
def test_a_warp_reaches_for_neighbouring_columns(dtypes):
    launches = columns_side_by_side(functools.partial(adam_of_80_columns, dtypes))
    assert launches == [("_read_kernel", {"1"}), ("_read_kernel", {"1"}), ("_update_kernel", {"1"})] * len(dtypes)


@each_dtypes
def test_rows_stay_in_registers(dtypes):
    limits = [registers for each in dtypes for registers in REGISTERS[each]]
    found = resources_of_launches(functools.partial(adam_of_80_columns, dtypes))
    for (name, needs), registers in zip(found, limits, strict=True):
        assert (needs.threads, needs.stack, needs.shared) == (32, 0, 0), (name, needs)
        assert needs.registers <= registers, (name, needs)


def test_moments_of_idle_columns_are_no_zeros(kernel_device, monkeypatch):
    if kernel_device.type == "cuda":
        pytest.skip("no look into what a GPU computes")
    roots, plain = [], tl.sqrt_rn

    @functools.wraps(plain)
    def noted(values, **given):
        roots.append(values.handle.data.copy())
        return plain(values, **given)

    monkeypatch.setattr(tl, "sqrt_rn", noted)
    table = Table(5, 10)
    parts = states(table, LAST, torch.Generator().manual_seed(0))
    check(kernel_device, table, parts, 50, betas=USUAL[0], eps=USUAL[1])
    assert len(roots) > 50
    assert all((values[5:] > 1e-3).all() for values in roots)


def test_idle_columns_hold_no_replay_up(kernel_device, fused):
    table = Table(5, 10)
    moments = torch.tensor([0.0, 1e-45]).repeat_interleave(5)[None]  # of which nothing decays
    check(kernel_device, table, (torch.ones(1, 5), moments, torch.tensor([1])), 1000, betas=USUAL[0], eps=USUAL[1])
    assert len(fused) < 300  # in the interpreter
