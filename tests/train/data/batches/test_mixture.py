import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.batches.mixture import Mixture

STARTS = st.integers(0, 10**12)
WEIGHTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=12).filter(any)


@st.composite
def thousandths(draw):
    cuts = sorted(draw(st.lists(st.integers(0, 1000), max_size=11)))
    return [int(part) for part in np.diff([0, *cuts, 1000])]


def counted(mixture, start, length=1000):
    return np.bincount(mixture.locate(np.arange(start, start + length))[0], minlength=len(mixture.shares))


@given(shares=thousandths(), start=STARTS)
def test_shares_in_thousandths_are_exact_over_any_thousand(shares, start):
    mixture = Mixture([share / 1000 for share in shares])
    assert counted(mixture, start).tolist() == shares


@given(weights=WEIGHTS, start=STARTS, length=st.integers(1, 5000))
def test_any_shares_are_less_than_four_sequences_off_over_any_stretch(weights, start, length):
    expected = length * np.array(weights) / sum(weights)
    assert np.abs(counted(Mixture(weights), start, length) - expected).max() < 4


@given(weights=WEIGHTS, number=st.integers(0, 10**13))
def test_counts_are_less_than_two_off_from_the_start_on(weights, number):
    counts = Mixture(weights).counts(number)
    assert sum(counts) == number
    whole = sum(weights)
    off = [abs(count * whole - number * weight) for count, weight in zip(counts, weights, strict=True)]
    assert max(off) < 2 * whole


@given(weights=WEIGHTS, start=st.integers(0, 10**9))
def test_each_source_is_numbered_without_gaps(weights, start):
    mixture, numbers = Mixture(weights), np.arange(start, start + 300)
    source_B, index_B = mixture.locate(numbers)
    for source, before in enumerate(mixture.counts(start)):
        mine = index_B[source_B == source]
        assert np.array_equal(mine, np.arange(before, before + len(mine)))
    shuffled = np.random.default_rng(0).permutation(300)
    assert np.array_equal(mixture.locate(numbers[shuffled])[1], index_B[shuffled]), "a sequence depends on the others"


def test_weights_are_taken_as_they_are_written():
    assert Mixture([0.7, 0.1, 0.2]).shares == (7, 1, 2)
    assert Mixture([3, 0, 6]).shares == (1, 0, 2)
    assert Mixture([123_456_789_012, 876_543_210_988]).shares == (123_456_789, 876_543_211)
    assert Mixture([1e-15, 1]).shares == (1, 10**9)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="none may be negative, and one must be above 0"):
        Mixture(weights)
