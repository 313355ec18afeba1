"""Adam on rows: the bits of dense Adam, whenever a row is used."""

import math

import pytest
import torch

from kernels.rows import adam as row_adam
from kernels.rows.adam import adam, replay_adam
from kernels.rows.rate_history import RateHistory
from tests.kernels.dense_adam import DenseAdam

DIM = 13  # odd: vectorised loops have a tail


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


def adam_views(records_UW):
    """Weights and moments, strided views of records with one more word on either side of the state."""
    return [records_UW[:, start : start + DIM] for start in (0, DIM, 2 * DIM)]


def adam_records(weights_UD):
    records = torch.zeros(weights_UD.shape[0], 3 * DIM + 1)
    records[:, :DIM] = weights_UD
    records[:, -1] = 7.0  # not the optimizer's
    return records


def replay(records_UW, last_step_U, rates, **options):
    """Replays rows in any order of their last steps."""
    last_step_U, order = last_step_U.sort(stable=True)
    taken = records_UW[order]
    replay_adam(*adam_views(taken), last_step_U.tolist(), RateHistory(rates), **options)
    records_UW[order] = taken


def learning_rates(steps):
    """Warm-up, a plateau, decay to zero, and a restart: rates that fall are not enough to let a row rest."""
    warm_up = [1e-3 * i / 100 for i in range(1, 101)]
    decay = [1e-3 * 0.5 * (1 + math.cos(math.pi * i / 400)) for i in range(401)]
    rates = warm_up + [1e-3] * 200 + decay + [0.05] * steps
    return rates[:steps]


def touched_rows(num_rows, steps, generator):
    """Rows with a gradient at every step, each coming back after 1 to 400 steps; the last row never has one."""
    mean_gaps = torch.logspace(0, math.log10(400), num_rows - 1).tolist()
    touched = [[] for _ in range(steps)]
    for row, mean_gap in enumerate(mean_gaps):
        step = int(torch.randint(0, 30, (), generator=generator))
        while step < steps:
            touched[step].append(row)
            step += int(torch.randint(1, max(2, math.ceil(mean_gap) + 1), (), generator=generator))
    return touched


@pytest.mark.parametrize(
    ("betas", "eps"),
    [
        ((0.9, 0.95), 1e-8),
        ((0.99, 0.9), 1e-8),
        pytest.param((0.9, 0.999), 1e-8, marks=pytest.mark.long),
        pytest.param((0.4, 0.999), 1e-20, marks=pytest.mark.long),
    ],
    ids=["pretraining", "first moment outlives the second", "usual", "no eps to speak of"],
)
def test_replayed_rows_equal_dense_adam_bit_for_bit(betas, eps):
    steps, num_rows = 1000, 24
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(num_rows, DIM, generator=generator) * 0.02
    weights[1], weights[2] = 0.0, -0.0
    rates = learning_rates(steps)
    dense, records = DenseAdam(weights, betas, eps), adam_records(weights)
    last_step = torch.zeros(num_rows, dtype=torch.int32)
    for step, rows in enumerate(touched_rows(num_rows, steps, generator), start=1):
        grads = torch.randn(len(rows), DIM, generator=generator) * 10 ** torch.randn(len(rows), 1, generator=generator)
        grads[:, 3] = 0.0  # a column that never has a gradient
        taken = records[rows]
        replay(taken, last_step[rows], rates[: step - 1], betas=betas, eps=eps)
        assert same_bits(taken[:, :DIM], dense.weights.detach()[rows])  # what the forward of this step reads
        adam(*adam_views(taken), grads, step=step, lr=rates[step - 1], betas=betas, eps=eps)
        records[rows], last_step[rows] = taken, step
        dense.step(
            torch.zeros_like(weights).index_copy_(0, torch.tensor(rows, dtype=torch.int64), grads), rates[step - 1]
        )
    assert (steps - last_step).max() > 100  # the replay at the end is a long one
    replay(records, last_step, rates, betas=betas, eps=eps)
    for part, expected in zip(adam_views(records), dense.parts(), strict=True):
        assert same_bits(part, expected)
    assert (records[:, -1] == 7.0).all()


def random_states(num_rows, generator):
    """Weights and moments of all magnitudes that float32 has, denormals and zeros among them."""

    def values(low, high):
        exponents = torch.rand(num_rows, DIM, generator=generator) * (high - low) + low
        return torch.randn(num_rows, DIM, generator=generator) * 2**exponents

    weights, exp_avg, exp_avg_sq = values(-140, 10), values(-149, 20), values(-149, 20).abs()
    weights[::5], exp_avg[::7], exp_avg_sq[::11] = 0.5, 1e-4, 1e-8
    exp_avg[:, ::6] = 0.0
    return torch.cat([weights, exp_avg, exp_avg_sq, torch.zeros(num_rows, 1)], dim=1)


def replay_counting(monkeypatch, records, last_step, rates, *, shortcut=True, **options):
    """Replays copies of ten rows at a time; returns them, and over how many rows and steps weights were computed."""
    counts = []
    move = row_adam._move
    with monkeypatch.context() as patch:
        patch.setattr(row_adam, "_move", lambda rows, *args: (counts.append(len(rows[0])), move(rows, *args)))
        if not shortcut:
            patch.setattr(row_adam, "_count_resting", lambda *args: 0)
        replayed = records.clone()
        for block in last_step.argsort(stable=True).split(10):  # a row that never rests holds up no other block
            taken = replayed[block]
            replay(taken, last_step[block], rates, **options)
            replayed[block] = taken
    return replayed, sum(counts)


@pytest.mark.parametrize(
    ("eps", "rates"),
    [(1e-8, [1e-9] * 400 + [1.0] * 1100), (1e-4, learning_rates(1500)), (2.0**-62, [1e-3] * 1500)],
    ids=["rising rate", "large eps", "smallest eps"],
)
def test_rows_are_left_to_rest_only_where_that_keeps_the_bits(monkeypatch, eps, rates):
    generator = torch.Generator().manual_seed(0)
    states = random_states(100, generator)
    states[50:, :DIM], states[50:, DIM : 2 * DIM], states[50:, 2 * DIM :] = 0.02, 1e-4, 1e-8  # as in training
    last_step = torch.randint(0, 1400, (100,), generator=generator)
    options = {"betas": (0.9, 0.999), "eps": eps}
    short, computed = replay_counting(monkeypatch, states, last_step, rates, **options)
    full, all_computed = replay_counting(monkeypatch, states, last_step, rates, shortcut=False, **options)
    assert computed < 0.95 * all_computed
    assert same_bits(short, full)


@pytest.mark.parametrize(
    ("weight", "exp_avg", "exp_avg_sq", "lr", "betas", "eps"),
    [
        (1.0, 1e-10, 1e-4, 1e-3, (0.99, 0.5), 1e-8),  # the second moment falls faster than the square of the first
        (1.0, 1e-10, 1e-4, 1e-1, (0.7, 0.5), 1e-40),  # it falls to zero, the first sticks at a denormal, eps is less
        (1e-20, 1e-44, 1e-6, 1.0, (0.9, 0.9), 2.0**-62),  # the first moment is a denormal and falls no further
    ],
)
def test_rows_whose_steps_grow_again_do_not_rest(monkeypatch, weight, exp_avg, exp_avg_sq, lr, betas, eps):
    records = torch.tensor([[weight, exp_avg, exp_avg_sq, 0.0]]).repeat_interleave(torch.tensor([DIM] * 3 + [1]), dim=1)
    options = {"betas": betas, "eps": eps}
    short, _ = replay_counting(monkeypatch, records, torch.tensor([100]), [lr] * 1100, **options)
    full, _ = replay_counting(monkeypatch, records, torch.tensor([100]), [lr] * 1100, shortcut=False, **options)
    at_first, _ = replay_counting(monkeypatch, records, torch.tensor([100]), [lr] * 120, shortcut=False, **options)
    assert not same_bits(full[:, :DIM], at_first[:, :DIM])
    assert same_bits(short, full)


def test_a_row_is_replayed_alike_in_any_company():
    generator = torch.Generator().manual_seed(0)
    states = random_states(64, generator)
    last_step = torch.randint(0, 300, (64,), generator=generator)
    together, alone = states.clone(), states.clone()
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    replay(together, last_step, learning_rates(300), **options)
    for row in torch.randperm(64, generator=generator).split(5):
        taken = alone[row]
        replay(taken, last_step[row], learning_rates(300), **options)
        alone[row] = taken
    assert same_bits(together, alone)


def test_nothing_to_replay(monkeypatch):
    monkeypatch.delattr(row_adam, "_replay")
    records = torch.randn(4, 3 * DIM + 1)
    before = records.clone()
    replay(records, torch.tensor([5, 5, 5, 5]), [1e-3] * 5, betas=(0.9, 0.999), eps=1e-8)
    replay(records[:0], torch.tensor([], dtype=torch.int32), [1e-3] * 5, betas=(0.9, 0.999), eps=1e-8)
    replay(records, torch.zeros(4, dtype=torch.int32), [], betas=(0.9, 0.999), eps=1e-8)
    assert same_bits(records, before)


def test_rows_that_are_up_to_date_among_others_stay():
    records = torch.randn(4, 3 * DIM + 1).abs()
    before = records.clone()
    replay(records, torch.tensor([5, 1, 5, 2]), [1e-3] * 5, betas=(0.9, 0.999), eps=1e-8)
    assert same_bits(records[0::2], before[0::2])
    assert (records[1::2, : 3 * DIM] != before[1::2, : 3 * DIM]).all()


def test_steps_that_change_nothing_are_not_computed(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    records = torch.randn(6, 3 * DIM + 1, generator=generator).abs() * 0.01
    # Two rows start long after the moments of the others have come to rest.
    last_step, rates = torch.tensor([0, 0, 3, 9, 5500, 6000]), [1e-3] * 6000
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    computed = []
    move = row_adam._move
    with monkeypatch.context() as patch:
        patch.setattr(row_adam, "_move", lambda rows, step, *args: (computed.append(step), move(rows, step, *args)))
        short = records.clone()
        replay(short, last_step, rates, **options)
        patch.setattr(row_adam, "_count_still", lambda *args: 0)
        full = records.clone()
        replay(full, last_step, rates, **options)
    first, second = computed[: computed.index(6000) + 1], computed[computed.index(6000) + 1 :]
    assert second == list(range(1, 6001))
    assert first[-500:] == list(range(5501, 6001))
    assert 1000 < len(first) - 500 < 4000
    assert same_bits(short, full)


def test_a_moment_of_a_single_denormal_is_replayed():
    records = adam_records(torch.full((1, DIM), -0.0))
    records[0, 2 * DIM - 1] = -0.0  # the step turns it, and then the weight, into +0
    dense = DenseAdam(records[:, :DIM], (0.9, 0.999), 1e-8)
    dense.step(torch.zeros(1, DIM), 1e-3)
    dense.optimizer.state[dense.weights]["exp_avg"].copy_(records[:, DIM : 2 * DIM])
    dense.step(torch.zeros(1, DIM), 1e-3)
    replay(records, torch.tensor([1]), [1e-3] * 2, betas=(0.9, 0.999), eps=1e-8)
    for part, expected in zip(adam_views(records), dense.parts(), strict=True):
        assert same_bits(part, expected)


def test_lazy_adam_is_pytorchs_sparse_adam():
    # torch.optim.SparseAdam adds eps elsewhere: compared where eps is nothing.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10, DIM, generator=generator)
    records = adam_records(weights)
    table = torch.nn.Parameter(weights.clone())
    sparse = torch.optim.SparseAdam([table], lr=0.01, betas=(0.9, 0.99), eps=1e-20)
    for step in range(1, 30):
        rows = torch.randperm(10, generator=generator)[:4]
        grads = torch.randn(4, DIM, generator=generator)
        taken = records[rows]
        adam(*adam_views(taken), grads, step=step, lr=0.01, betas=(0.9, 0.99), eps=1e-20)
        records[rows] = taken
        table.grad = torch.sparse_coo_tensor(rows[None], grads, weights.shape, check_invariants=True)
        sparse.step()
    torch.testing.assert_close(records[:, :DIM], table.detach())
