from hypothesis import given
from hypothesis import strategies as st

from train.data.order import permutation


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 50))
def test_permutation_of_everything(count, seed, epoch):
    assert sorted(permutation(count, seed, epoch, 0).tolist()) == list(range(count))


def test_every_part_of_the_key_matters_also_beyond_32_bits():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (2**32, 1, 0)]
    assert len({tuple(permutation(64, *key).tolist()) for key in keys}) == len(keys)


def test_order_is_frozen():
    # A run that was cut off must go on with the same data under another version of NumPy or of this code.
    assert permutation(8, 1234, 5, 0).tolist() == [5, 7, 3, 2, 1, 0, 4, 6]
