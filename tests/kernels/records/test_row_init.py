import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.records.row_init import initial_rows

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def finalize(z):
    """SplitMix64's finalizer."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_value(seed, row, column, std):
    seed_key = finalize((seed + 1) * GAMMA & MASK)
    row_key = finalize((row * GAMMA + seed_key) & MASK)
    word = finalize(row_key ^ finalize((column + 1) * GAMMA & MASK))
    total = sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 2 * 0xFFFF
    return np.float32(total) * np.float32(std / math.sqrt((2**32 - 1) / 3))


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item()


@given(st.integers(-(2**65), 2**65), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4), st.integers(1, 5))
def test_bits_equal_those_of_python_integers(seed, row_ids, dim):
    values = initial_rows(torch.tensor(row_ids, dtype=torch.int64), dim, seed=seed, std=0.02)
    expected = np.array([[slow_value(seed, row, column, 0.02) for column in range(dim)] for row in row_ids], np.float32)
    assert values.numpy().tobytes() == expected.tobytes()


def test_golden_values():
    # Tables already trained were initialised with these: they may never change.
    values = initial_rows(torch.tensor([0, 1, 384_006_167]), 2, seed=0, std=1.0)
    assert values.tolist() == [
        [-1.632307767868042, -0.3893784284591675],
        [-1.5622973442077637, -0.7365497350692749],
        [-1.005993366241455, 0.13930724561214447],
    ]


def test_distribution():
    values = initial_rows(torch.arange(8192), 64, seed=3, std=0.5).double()
    standard_error = 0.5 / math.sqrt(values.numel())
    assert abs(values.mean()) < 4 * standard_error
    assert abs(values.std() - 0.5) < 4 * standard_error
    kurtosis = (values / 0.5).pow(4).mean().item()
    assert kurtosis == pytest.approx(3 - 0.3, abs=0.03)
    assert values.abs().max() <= 0.5 * math.sqrt(12)
    # Every row and every column has the spread of its own count of values.
    assert values.mean(1).std().item() == pytest.approx(0.5 / math.sqrt(64), rel=0.05)
    assert values.mean(0).std().item() == pytest.approx(0.5 / math.sqrt(8192), rel=0.4)


def test_independence_of_rows_columns_and_seeds():
    ids = torch.arange(20000)
    values = initial_rows(ids, 16, seed=0, std=1.0)
    limit = 4.5 / math.sqrt(20000 * 16)
    assert abs(correlation(values[1:], values[:-1])) < limit
    assert abs(correlation(values[:, 1:], values[:, :-1])) < limit
    assert abs(correlation(values[1:, :-1], values[:-1, 1:])) < limit
    assert abs(correlation(values, initial_rows(ids, 16, seed=1, std=1.0))) < limit
    assert abs(correlation(values[1:], initial_rows(ids, 16, seed=1, std=1.0)[:-1])) < limit
    off_diagonal = torch.corrcoef(values.T) - torch.eye(16)
    assert off_diagonal.abs().max() < 4.5 / math.sqrt(20000)


def test_no_two_rows_are_alike():
    values = initial_rows(torch.cat([torch.arange(50000), torch.arange(2**40, 2**40 + 50000)]), 4, seed=0, std=1.0)
    assert len(values.unique(dim=0)) == 100000


def test_a_row_does_not_depend_on_its_company():
    ids = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    whole = initial_rows(ids, 48, seed=7, std=0.1)  # several of the chunks drawn at a time
    parts = torch.cat([initial_rows(part, 48, seed=7, std=0.1) for part in ids.split(37)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[:, :5], initial_rows(ids, 5, seed=7, std=0.1))


def test_edges():
    assert initial_rows(torch.empty(0, dtype=torch.int64), 8, seed=0, std=1.0).shape == (0, 8)
    assert not initial_rows(torch.arange(10), 8, seed=0, std=0.0).any()


def test_row_ids_are_left_alone():
    ids = torch.arange(10)
    initial_rows(ids, 4, seed=0, std=1.0)
    assert torch.equal(ids, torch.arange(10))
