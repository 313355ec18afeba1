"""Moments kept in bf16, against an Adam in NumPy's float64 that knows nothing of the code under test.

It decodes records by their bytes, replays gaps from what is stored, and asks of what is stored next only that it is one
of the two bfloat16 neighbours of the true value, drawn without bias and apart from other draws.

Shape suffixes: R rows, D columns of a row, W words of a record, N rounded numbers.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels import compiled_loops
from offload.config import RowDtype, TableOptimizerConfig
from offload.rows.records import RecordLayout, RowInit
from offload.rows.updater import RowUpdater

DIM, ROWS, STEPS, SEED = 7, 300, 40, 5
RATE, BETA1, BETA2, EPS = 5e-3, 0.9, 0.95, 1e-8
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Parts:
    """Weights, first and second moments [R, D] as float64, and versions [R]."""

    numbers: tuple[Floats, Floats, Floats]
    versions: NDArray[np.int32]


def decode(records_RW: torch.Tensor, row_dtype: RowDtype) -> Parts:
    """The parts of records whose moments are bfloat16, from their bytes."""
    raw = records_RW.numpy().tobytes()
    halves = np.frombuffer(raw, np.uint16).reshape(len(records_RW), -1)
    start = DIM + DIM % 2 if row_dtype == "bf16" else 2 * DIM
    bits = halves.astype(np.uint32) << 16
    weights = bits[:, :DIM].view(np.float32)
    if row_dtype == "fp32":
        weights = np.frombuffer(raw, np.float32).reshape(len(records_RW), -1)[:, :DIM]
    moments = bits[:, start : start + 2 * DIM].view(np.float32)
    assert halves.shape[1] == start + 2 * DIM + 2, "weights, moments and version are all that a record holds"
    versions = np.frombuffer(raw, np.int32).reshape(len(records_RW), -1)[:, -1]
    return Parts(tuple(part.astype(np.float64) for part in (weights, moments[:, :DIM], moments[:, DIM:])), versions)


def advance(numbers: tuple[Floats, Floats, Floats], step: int, grad: Floats | float) -> tuple[Floats, Floats, Floats]:
    """One step of Adam (Kingma and Ba, algorithm 1)."""
    weights, means, squares = numbers
    means = BETA1 * means + (1 - BETA1) * grad
    squares = BETA2 * squares + (1 - BETA2) * grad * grad
    corrected = means / (1 - BETA1**step), squares / (1 - BETA2**step)
    return weights - RATE * corrected[0] / (np.sqrt(corrected[1]) + EPS), means, squares


def true_update(before: Parts, step: int, grad: Floats, exact: bool) -> tuple[Floats, Floats, Floats]:
    """What an update at `step` comes to, in float64, from the records before."""
    rows = []
    for row, version in enumerate(before.versions):
        numbers = tuple(part[row] for part in before.numbers)
        for missed in range(version + 1, step) if exact and version else ():
            numbers = advance(numbers, missed, 0.0)
        rows.append(advance(numbers, step, grad[row]))
    return tuple(np.stack(part) for part in zip(*rows, strict=True))


@dataclass(frozen=True)
class Rounded:
    """Numbers that were rounded: at which share of the gap to its larger neighbour each was, and whether it rose."""

    shares_N: Floats
    went_up_N: Floats

    @property
    def errors_N(self) -> Floats:
        """Of mean 0 and variance share (1 - share), if the rounding has no bias."""
        return self.went_up_N - self.shares_N


def rounded(true: Floats, stored: Floats) -> Rounded:
    """Finds the bfloat16 neighbours of the true values [R, D]; what is stored must be one of them."""
    # What sums cancelled down to is known less well than float32 would have it.
    known = np.abs(true) > 1e-3 * np.abs(true).max(axis=1, keepdims=True)
    true, stored = true[known], stored[known]
    exponents = np.floor(np.log2(np.abs(true)))
    gaps = 2.0 ** (exponents - 7)
    low = np.floor(np.abs(true) / gaps) * gaps
    shares, up = (np.abs(true) - low) / gaps, (np.abs(stored) - low) / gaps
    # Next to a bfloat16, float32 may have come out on its other side.
    clear = (shares > 1e-2) & (shares < 1 - 1e-2)
    assert np.isin(up[clear], (0, 1)).all(), "a moment is no neighbour of its true value: it was rounded more than once"
    assert (np.abs(up - shares)[~clear] < 1.02).all()
    return Rounded(shares[clear], up[clear])


def used_rows(step: int) -> torch.Tensor:
    """Some rows at every step, some with gaps of up to 20."""
    rows = torch.arange(ROWS)
    return rows[(step + rows) % (1 + rows % 21) == 0]


def gradient(step: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, DIM, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)


def train(row_dtype: RowDtype, untouched_rows: str) -> list[list[Rounded]]:
    """Trains a table and checks every update; the roundings of weights (if bf16) and moments of each step."""
    config = TableOptimizerConfig(
        untouched_rows=untouched_rows, state_dtype="bf16", lr_factor=1.0, beta1=BETA1, beta2=BETA2, eps=EPS
    )
    layout = RecordLayout.of(DIM, config, row_dtype)
    updater, table = RowUpdater(config, layout, seed=SEED), torch.zeros(ROWS, layout.words)
    RowInit(SEED, 0.02).fill(layout, table, torch.arange(ROWS))
    steps = []
    for step in range(1, STEPS + 1):
        rows, before = used_rows(step), table.clone()
        grad = gradient(step, len(rows))
        for others in (torch.arange(ROWS), rows):  # looking at rows leaves them alone
            read = updater.read(table, others)
        assert torch.equal(table.view(torch.int32), before.view(torch.int32))
        updater.update_at(read, grad, RATE, rows + 2**40)
        true = true_update(decode(before[rows], row_dtype), step, grad.double().numpy(), untouched_rows == "exact")
        after = decode(table[rows], row_dtype)
        assert (after.versions == step).all()
        kept = slice(1, 3) if row_dtype == "fp32" else slice(0, 3)
        if row_dtype == "fp32":
            np.testing.assert_allclose(after.numbers[0], true[0], rtol=1e-5, atol=1e-6)
        steps.append([rounded(*pair) for pair in zip(true[kept], after.numbers[kept], strict=True)])
    return steps


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@pytest.mark.parametrize("untouched_rows", ["exact", "lazy"])
@pytest.mark.parametrize("row_dtype", ["fp32", "bf16"])
def test_each_update_is_rounded_once_to_a_neighbour_without_bias(
    row_dtype: RowDtype, untouched_rows: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(compiled_loops, "available", lambda: False)
    steps = train(row_dtype, untouched_rows)
    for part in zip(*steps, strict=True):
        errors = np.concatenate([each.errors_N for each in part])
        shares = np.concatenate([each.shares_N for each in part])
        assert len(errors) > 5000
        assert abs(errors.sum()) < 4.5 * np.sqrt((shares * (1 - shares)).sum())
        # Not by chance either: large shares go up often, small ones seldom, just as often as they must.
        for low in np.arange(0, 1, 0.25):
            some = (low <= shares) & (shares < low + 0.25)
            assert abs(errors[some].sum()) < 4.5 * np.sqrt((shares * (1 - shares))[some].sum())


def draws(seed: int, step: int, rows: int = 4000) -> list[NDArray[np.bool_]]:
    """Whether weights and moments went up, of rows whose numbers are all the same."""
    config = TableOptimizerConfig(state_dtype="bf16", lr_factor=1.0, beta1=0.5, beta2=0.5, eps=1.0)
    layout = RecordLayout.of(DIM, config, "bf16")
    updater, table = RowUpdater(config, layout, seed=seed), torch.zeros(rows, layout.words)
    layout.version(table)[:] = step - 1
    updater.load_state(updater.state() | {"learning_rates": [RATE] * (step - 1)})
    layout.weights(table)[:] = 1.0
    read = updater.read(table, torch.arange(rows))
    # Weights, g / 2 and g^2 / 2 come to a third, a quarter and a half of the way between two neighbours.
    grad = torch.full((rows, DIM), 2 + 2.0**-8)
    updater.update_at(read, grad, 2.0**-8, torch.arange(rows))
    found = []
    for part in decode(table, "bf16").numbers:
        values = np.unique(part)
        assert len(values) == 2, "every number is rounded to one of two"
        found.append(part == values[1])
    return found


def test_weights_and_moments_draw_apart_from_each_other_from_columns_rows_steps_and_seeds() -> None:
    weights, means, squares = draws(0, 1)
    limit = 4.5 / np.sqrt(weights.size)
    for a, b in (
        (weights, means),
        (weights, squares),
        (means, squares),
        (weights[:, 1:], means[:, :-1]),
        (weights[1:], means[:-1]),
        (means[1:], means[:-1]),
        (means, draws(0, 2)[1]),
        (means, draws(1, 1)[1]),
        (squares, draws(0, 2)[2]),
        (weights, draws(0, 2)[1]),
    ):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 1.1 * limit
    columns = np.corrcoef(np.concatenate([weights, means, squares], axis=1).T.astype(float))
    assert np.abs(columns - np.eye(3 * DIM)).max() < 4.5 / np.sqrt(len(weights))
    assert all(np.array_equal(*pair) for pair in zip((weights, means, squares), draws(0, 1), strict=True))
