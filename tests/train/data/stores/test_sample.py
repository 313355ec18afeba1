import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.data.stores.sample import hash_numbers, sample_texts


@given(st.lists(st.text("ab", min_size=1, max_size=30), max_size=60), st.integers(1, 400))
def test_sample_is_bounded_ordered_and_whole_when_it_fits(texts, limit):
    numbered = [f"{i}:{text}" for i, text in enumerate(texts)]
    sample = sample_texts(numbered, limit)
    if sum(map(len, numbered)) <= limit:
        assert sample == numbered
        return
    assert sum(map(len, sample)) <= limit
    numbers = [int(text.split(":")[0]) for text in sample if ":" in text]
    assert numbers == sorted(numbers)
    assert sample


def test_sample_is_spread_over_the_stream():
    sample = sample_texts((f"{i:05}" for i in range(20_000)), 5000)
    numbers = np.array([int(text) for text in sample])
    assert 400 < len(numbers) <= 1000
    assert all(((numbers >= 5000 * quarter) & (numbers < 5000 * (quarter + 1))).sum() > 50 for quarter in range(4))


def test_hash_is_splitmix64():
    # First outputs of the reference generator seeded with 0.
    assert [hex(value) for value in hash_numbers(np.arange(3)).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]
