import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from tests.kernels.records.test_row_init import GAMMA, MASK, finalize


def stochastic_round_bf16(values, row_ids, **key):
    """The rounded values as bfloat16, with nothing lost."""
    rounded = values.clone()
    stochastic_round_bf16_(rounded, row_ids, **key)
    assert torch.equal(rounded.to(torch.bfloat16).float().nan_to_num(), rounded.nan_to_num())
    return rounded.to(torch.bfloat16)


def slow_round(bits, row, column, seed, step, part):
    """The bfloat16 bits, by Python integers alone; the value is finite."""
    seed_key = finalize((seed + 1) * GAMMA & MASK)
    step_key = finalize((step * GAMMA + seed_key) & MASK)
    if part == "state":
        step_key = finalize((GAMMA + step_key) & MASK)
    row_key = finalize((row * GAMMA + step_key) & MASK)
    word = finalize(row_key ^ finalize((column // 4 + 1) * GAMMA & MASK))
    return ((bits + (word >> 16 * (column % 4) & 0xFFFF)) >> 16) & 0xFFFF


def as_bits(values):
    return values.view(torch.int16).to(torch.int32).bitwise_and(0xFFFF).tolist()


@given(
    st.integers(-(2**65), 2**65),
    st.integers(0, 2**40),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.integers(1, 7),
    st.sampled_from(["weights", "state"]),
    st.randoms(use_true_random=False),
)
def test_bits_equal_those_of_python_integers(seed, step, row_ids, dim, part, random):
    finite = [[random.choice([0, 1]) << 31 | random.randrange(0xFF << 23) for _ in range(dim)] for _ in row_ids]
    signed = [[b - 2**32 if b >= 2**31 else b for b in row] for row in finite]
    values = torch.tensor(signed, dtype=torch.int32).reshape(len(row_ids), dim).view(torch.float32)
    rounded = stochastic_round_bf16(values, torch.tensor(row_ids, dtype=torch.int64), seed=seed, step=step, part=part)
    expected = [
        [slow_round(b, row, column, seed, step, part) for column, b in enumerate(bits)]
        for row, bits in zip(row_ids, finite, strict=True)
    ]
    assert as_bits(rounded) == expected


def test_golden_values():
    # Runs that resume must go on with these: they may never change.
    values = torch.full((2, 5), 1 + 2.0**-9)
    rounded = stochastic_round_bf16(values, torch.tensor([0, 384_006_167]), seed=0, step=1)
    up = 1 + 2.0**-7
    assert rounded.tolist() == [[up, 1.0, up, 1.0, up], [1.0, 1.0, up, 1.0, up]]
    halfway = torch.full((2, 6), 1 + 2.0**-8)
    state = stochastic_round_bf16(halfway, torch.tensor([0, 384_006_167]), seed=0, step=1, part="state")
    assert (state > 1).tolist() == [
        [False, True, False, False, False, True],
        [False, True, True, True, True, False],
    ]


def neighbours(values):
    """The bfloat16 towards zero, and the one away from it."""
    low = values.view(torch.int32).bitwise_and(~0xFFFF)
    return low.view(torch.float32), (low + 0x10000).view(torch.float32)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_expectation_is_the_value(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, 9, generator=generator) * 0.02
    low, high = neighbours(values)
    draws = torch.cat(
        [
            stochastic_round_bf16(values.expand(2000, 9), torch.arange(2000), seed=seed, step=step).float()
            for step in range(1, 21)
        ]
    )
    assert ((draws == low) | (draws == high)).all()
    share = (values - low) / (high - low)
    error = ((draws.double().mean(0) - values[0]) / (high - low)).abs()
    assert (error < 4.5 * (share * (1 - share) / len(draws)).sqrt()).all()


def test_a_long_run_of_small_steps_arrives():
    # Each step is 2^-12 of the weight, a sixteenth of what rounding to nearest would ever let through.
    weights, ids = torch.ones(400, 8), torch.arange(400)
    for step in range(1, 401):
        weights = stochastic_round_bf16(weights + 2.0**-12, ids, seed=3, step=step).float()
    assert weights.mean() == pytest.approx(1 + 400 * 2.0**-12, abs=0.002)


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


def test_independence_of_columns_rows_steps_seeds_and_parts():
    halfway = torch.full((20000, 12), 1 + 2.0**-8)

    def ups(seed, step, part="weights"):
        return (stochastic_round_bf16(halfway, torch.arange(20000), seed=seed, step=step, part=part) > 1).float()

    draws, limit = ups(0, 1), 4.5 / math.sqrt(20000 * 12)
    assert abs(draws.mean() - 0.5) < limit
    assert abs(correlation(draws[1:], draws[:-1])) < limit
    assert abs(correlation(draws, ups(0, 2))) < limit
    assert abs(correlation(draws, ups(1, 1))) < limit
    assert abs(correlation(draws, ups(0, 1, "state"))) < limit
    assert abs(correlation(draws[1:], ups(0, 2)[:-1])) < limit
    assert abs(correlation(draws[1:], ups(1, 1)[:-1])) < limit
    off_diagonal = torch.corrcoef(draws.T) - torch.eye(12)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(20000)


def test_what_is_a_bfloat16_stays():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).reshape(64, -1)
    values = bits.to(torch.int16).view(torch.bfloat16)
    values = torch.where(values.isnan(), torch.zeros_like(values), values)
    for step in range(1, 4):
        rounded = stochastic_round_bf16(values.float(), torch.arange(64), seed=0, step=step)
        assert torch.equal(rounded.view(torch.int16), values.view(torch.int16))


def test_infinities_and_nans_stay():
    # NaNs whose payload would carry into the sign, or lies only in the bits that are cut off.
    bits = torch.tensor([0x7F800000, -0x800000, 0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF, 0x7FC00000], dtype=torch.int32)
    values = bits.view(torch.float32).expand(500, 7)
    rounded = stochastic_round_bf16(values, torch.arange(500), seed=0, step=1)
    assert (rounded[:, 0] == torch.inf).all()
    assert (rounded[:, 1] == -torch.inf).all()
    assert rounded[:, 2:].isnan().all()


def test_the_largest_values_round_past_the_largest_bfloat16():
    largest = torch.tensor([[torch.finfo(torch.float32).max]]).expand(1000, 1)
    assert stochastic_round_bf16(largest, torch.arange(1000), seed=0, step=1).float().isinf().float().mean() > 0.99


def test_a_row_does_not_depend_on_its_company_or_layout():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(5000, generator=generator)
    wide = torch.randn(5000, 50, generator=generator)
    wide[3000, 5] = torch.inf
    values = wide[:, 1:-1].clone()
    stochastic_round_bf16_(wide[:, 1:-1], ids, seed=7, step=2)  # a strided view, of several chunks
    parts = [stochastic_round_bf16(v, i, seed=7, step=2) for v, i in zip(values.split(37), ids.split(37), strict=True)]
    assert torch.equal(wide[:, 1:-1], torch.cat(parts).float())


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_round(shape):
    rounded = stochastic_round_bf16(torch.zeros(shape), torch.arange(shape[0]), seed=0, step=1)
    assert rounded.shape == shape
