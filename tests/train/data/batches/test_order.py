import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.batches import order
from train.data.batches.order import epoch_order, permutation


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 50))
def test_permutation_of_everything(count, seed, epoch):
    assert sorted(permutation(count, seed, epoch, 0).tolist()) == list(range(count))


def test_every_part_of_the_key_matters_also_beyond_32_bits():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (2**32, 1, 0)]
    assert len({tuple(permutation(64, *key).tolist()) for key in keys}) == len(keys)


def test_order_is_frozen():
    # A run that was cut off must go on with the same data under another version of NumPy or of this code.
    assert permutation(8, 1234, 5, 0).tolist() == [5, 7, 3, 2, 1, 0, 4, 6]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 120), st.integers(0, 5))
def test_a_window_has_every_document_once_and_few_parts_at_a_time(lengths, length, window, epoch):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = np.flatnonzero(lengths)
    if not len(documents):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PART_TOKENS", 20)
        found = epoch_order(offsets, documents, length=length, seed=1, epoch=epoch, window=window)
    count = sum(lengths) // length
    assert sorted(found.sequences.tolist()) == list(range(count))
    pieces = found.stream.pieces(found.sequences, length)
    places = np.concatenate([[], *(np.arange(n) + at for at, n in zip(pieces.starts_P, pieces.lengths_P, strict=True))])
    assert len(set(places)) == len(places) == count * length
    # The parts that sequences begin in: once left, a window's parts do not come again.
    rows = np.searchsorted(pieces.row_P, np.arange(count))
    document = np.searchsorted(offsets, pieces.starts_P[rows], side="right") - 1
    part = offsets[document] // 20
    first, last = ({p: int(np.flatnonzero(part == p)[end]) for p in set(part.tolist())} for end in (0, -1))
    open_at_once = max((sum(first[p] <= at <= last[p] for p in first) for at in range(count)), default=0)
    assert open_at_once <= max(1, window // 20)


def test_a_windowed_order_depends_on_seed_and_epoch_and_differs_from_the_plain_one():
    offsets = np.arange(0, 4001, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "PART_TOKENS", 100)
        orders = [
            epoch_order(offsets, np.arange(1000), length=8, seed=seed, epoch=epoch, window=window)
            for seed, epoch, window in [(1, 0, 400), (2, 0, 400), (1, 1, 400), (1, 0, 800), (1, 0, None)]
        ]
    starts = {tuple(found.stream.pieces(found.sequences, 8).starts_P.tolist()) for found in orders}
    assert len(starts) == 5
