"""The compiled pass over records: the bits of dense Adam, whenever a row is used."""

import math
from itertools import product

import pytest
import torch
from torch.nn.functional import pad

from kernels.gather.values import RowValues
from kernels.rows.adam import adam, replay_adam
from kernels.rows.adam_closed import GapSums, close_gaps
from kernels.rows.adam_numba import find_rows, update_rows
from kernels.rows.adam_rates import AdamRates
from kernels.rows.caught_up import CaughtUp
from kernels.rows.rate_history import RateHistory
from kernels.rows.row_update import RowUpdate
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.grid import grid
from tests.kernels.dense_adam import DenseAdam
from tests.kernels.row_records import Table, same_bits
from tests.kernels.rows.resting import each_resting

ROWS, DIM = 40, 16  # whole vectors of the processor: torch's loop over what remains rounds otherwise
WORDS = 3 * DIM + 1


def fresh_window(weights):
    """Rows in random slots of a window with free slots between them."""
    slots = torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(1))[:ROWS]
    window = torch.full((2 * ROWS, WORDS), 7.0)
    window[slots] = 0
    window[slots, :DIM] = weights
    return window, slots


def room(rows, dim, catches_up=True):
    state = torch.zeros(rows, 2 * dim) if catches_up else None
    return CaughtUp(torch.zeros(rows, dim), state, torch.zeros(rows, dtype=torch.int64))


def read_rows(records, slots, rates, got, bf16=False, bf16_state=False):
    """All rows' weights, from wherever they are."""
    places = slots  # lazy Adam makes up for nothing
    if got.state_US is not None:
        find_rows(records, slots, rates, got, bf16=bf16, bf16_state=bf16_state)
        places = got.places_U
    return RowValues(records, places, got.weights_UD, bf16).tensor()


def versions(window):
    return window.view(torch.int32)[:, -1]


def rate(step):
    """Warm-up, decay to zero, a restart: rates that fall are not enough to let a row rest."""
    return 0.05 if step > 800 else 1e-3 * min(step / 100, 0.5 * (1 + math.cos(math.pi * step / 800)))


@pytest.mark.parametrize(
    ("betas", "eps"),
    [
        ((0.9, 0.95), 1e-8),
        ((0.5, 0.5), 0),
        *(pytest.param(betas, 1e-8, marks=pytest.mark.long) for betas in ((0.9, 0.999), (0.4, 0.95), (0.97, 0.9))),
    ],
)
def test_rows_that_come_back_after_1_to_400_steps_are_those_of_dense_adam(betas, eps):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(ROWS, DIM, generator=generator) * 0.02
    window, slots = fresh_window(weights)
    dense, rates = DenseAdam(weights, betas, eps or 1e-30), RateHistory()
    steps = AdamRates(rates, betas, eps or 1e-30, "cpu")
    whole = room(ROWS, DIM)
    due = torch.randint(1, 30, (ROWS,), generator=generator)
    gaps = torch.logspace(0, math.log10(400), ROWS).ceil().long()
    due[-1] = 10**6  # never has a gradient
    for step in range(1, 1001):
        used = (due == step).nonzero().flatten()
        due[used] = step + (torch.rand(len(used), generator=generator) * gaps[used]).ceil().long().clamp(min=1)
        got = CaughtUp(*(part[: len(used)] for part in whole))
        assert torch.equal(read_rows(window, slots[used], steps, got), dense.weights.detach()[used])
        # Gradients with denormals and exact zeros among them.
        grad = torch.randn(len(used), DIM, generator=generator) * torch.tensor([1e-3, 1e-22, 0.0, 10.0]).repeat(4)
        rates.append(rate(step))
        update_rows(RowUpdate(window, slots[used], grad, step=step, gradient_scale=0.25), steps, got)
        dense.step(torch.zeros(ROWS, DIM).index_copy_(0, used, grad * 0.25), rate(step))
        assert (versions(window)[slots[used]] == step).all()
    assert torch.equal(read_rows(window, slots, steps, whole), dense.weights.detach())
    behind = (versions(window)[slots] > 0) & (versions(window)[slots] < len(steps))
    assert behind.sum() > ROWS / 2
    assert torch.equal(whole.places_U, torch.where(behind, -1 - torch.arange(ROWS), slots))
    assert torch.equal(torch.cat(whole[:2], dim=1)[behind], torch.cat(dense.parts(), dim=1)[behind])
    free = torch.ones(2 * ROWS, dtype=torch.bool).index_fill_(0, slots, False)
    assert (window[free] == 7).all()


def test_lazy_rows_keep_their_moments_while_they_rest():
    weights = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    window, slots = fresh_window(weights)
    rates = RateHistory()
    steps = AdamRates(rates, (0.9, 0.95), 1e-8, "cpu")
    for used in (torch.arange(ROWS), torch.tensor([3])):
        rates.append(0.1)
        got = room(len(used), DIM, catches_up=False)
        read_rows(window, slots[used], steps, got)
        update_rows(RowUpdate(window, slots[used], torch.ones(len(used), DIM), step=len(rates)), steps, got)
    resting = torch.arange(ROWS) != 3
    assert torch.allclose(window[slots[resting], DIM : 2 * DIM], torch.tensor(0.1))
    assert torch.allclose(window[slots[3], DIM : 2 * DIM], torch.tensor(0.19))
    got = room(ROWS, DIM, catches_up=False)
    assert torch.equal(read_rows(window, slots, steps, got), window[slots, :DIM])


def expected_rows(table, slots, rates, untouched):
    """Weights and moments after all missed steps, by the reference."""
    records = table.records[slots]
    last = records.view(torch.int32)[:, -1]
    parts = [table.weights(records), *(part.clone() for part in table.state(records).chunk(2, dim=1))]
    behind = ((last > 0) & (last < len(rates))).nonzero().flatten()
    if untouched != "lazy":
        behind = behind[last[behind].argsort(stable=True)]
        taken = [part[behind] for part in parts]
        if untouched == "closed":
            close_gaps(*taken, last[behind].tolist(), GapSums(rates, (0.9, 0.95), 1e-8, "cpu"))
        else:
            replay_adam(*taken, last[behind].tolist(), rates, betas=(0.9, 0.95), eps=1e-8)
        for part, values in zip(parts, taken, strict=True):
            part[behind] = values
    return parts


@pytest.mark.parametrize(
    ("dim", "form"), grid([1, 5, 16, 80], [*product([False, True], [False, True], ["exact", "closed", "lazy"])])
)
def test_rows_of_every_dtype_have_the_bits_of_the_reference(dim, form):
    bf16, bf16_state, untouched = form
    generator, seed = torch.Generator().manual_seed(dim), 7
    table = Table(dim, 2 * dim, bf16, bf16_state=bf16_state)
    last = torch.randint(0, 50, (ROWS,), generator=generator)
    last[:3] = torch.tensor([0, 49, 50])
    state = torch.randn(ROWS, 2 * dim, generator=generator) * 1e-4
    state[:, dim:] **= 2
    state[last == 0] = 0.0
    slots = table.place(torch.randn(ROWS, dim, generator=generator) * 0.02, state, last)
    history = RateHistory([1e-3 * (1 + step % 7) for step in range(50)])
    rates = AdamRates(history, (0.9, 0.95), 1e-8, "cpu", closed=untouched == "closed")
    ids = torch.randint(0, 2**62, (ROWS,), generator=generator)
    got = room(ROWS, dim, untouched != "lazy")
    dtypes, records = {"bf16": bf16, "bf16_state": bf16_state}, table.records.clone()
    weights = read_rows(records, slots, rates, got, **dtypes)
    expected = expected_rows(table, slots, history, untouched)
    assert same_bits(weights, expected[0])
    assert same_bits(records, table.records)

    grad = torch.randn(ROWS, dim, generator=generator)
    history.append(2e-3)
    update_rows(RowUpdate(records, slots, grad, ids, step=51, **dtypes, seed=seed, gradient_scale=0.25), rates, got)
    # Whole vectors of the processor: torch's loop over what remains rounds otherwise.
    wide = [pad(part, (0, -dim % 16)) for part in (*expected, grad * 0.25)]
    adam(*wide, step=51, lr=2e-3, betas=(0.9, 0.95), eps=1e-8)
    weights, *moments = (part[:, :dim].contiguous() for part in wide[:3])
    state = torch.cat(moments, dim=1)
    if bf16:
        stochastic_round_bf16_(weights, ids, seed=seed, step=51)
    if bf16_state:
        stochastic_round_bf16_(state, ids, seed=seed, step=51, part="state")
    table.fill(slots, weights, state, torch.full((ROWS,), 51))
    assert same_bits(records, table.records)


@each_resting
def test_a_row_rests_only_where_no_later_step_changes_it(weight, exp_avg, exp_avg_sq, lr, betas, eps):
    record = torch.tensor([[weight, exp_avg, exp_avg_sq]]).repeat_interleave(DIM, dim=1)
    window = torch.cat([record, torch.tensor([[100]], dtype=torch.int32).view(torch.float32)], dim=1)
    history = RateHistory([lr] * 299 + [0.0])  # the last rate tells nothing of those before
    got = room(1, DIM)
    find_rows(window, torch.tensor([0]), AdamRates(history, betas, eps, "cpu"), got)
    replay_adam(*record.split(DIM, dim=1), [100], history, betas=betas, eps=eps)
    assert same_bits(torch.cat(got[:2], dim=1), record)


@pytest.mark.parametrize("dtypes", [{"bf16": True}, {"bf16_state": True}])
def test_bf16_rows_without_ids_are_refused(dtypes):
    steps = AdamRates(RateHistory([0.1]), (0.9, 0.95), 1e-8, "cpu")
    update = RowUpdate(torch.zeros(3, 40), torch.arange(2), torch.zeros(2, DIM), step=1, **dtypes)
    with pytest.raises(ValueError, match="rounded by their ids, but none are given"):
        update_rows(update, steps, room(2, DIM))


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
            records, got = window.clone(), room(rows, DIM)
            read_rows(records, slots, steps, got)
            update_rows(RowUpdate(records, slots, torch.ones(rows, DIM), step=5), steps, got)
            results.append(torch.cat([records, *got[:2]], dim=1).view(torch.int32))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_no_rows():
    steps = AdamRates(RateHistory([0.1]), (0.9, 0.95), 1e-8, "cpu")
    window, nothing = torch.zeros(3, WORDS), torch.zeros(0, dtype=torch.int64)
    read_rows(window, nothing, steps, room(0, DIM))
    update_rows(RowUpdate(window, nothing, torch.zeros(0, DIM), step=1), steps, room(0, DIM))
    assert not window.any()
