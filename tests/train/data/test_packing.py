"""Packing against a packer in plain Python that walks token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.packing import IGNORED, DocumentStream

PAD = 999


def slow_pack(documents, order, number, length):
    flat = []
    for document in order:
        tokens = documents[document]
        for i, token in enumerate(tokens):
            flat.append((token, tokens[i + 1] if i + 1 < len(tokens) else IGNORED, document))
    row = flat[number * length : (number + 1) * length]
    positions, previous = [], None
    for place, (_, _, document) in enumerate(row):
        start = place == 0 or document != previous
        positions.append(0 if start else positions[-1] + 1)
        previous = document
    missing = length - len(row)
    tokens = [token for token, _, _ in row] + [PAD] * missing
    labels = [label for _, label, _ in row] + [IGNORED] * missing
    return tokens, labels, positions + list(range(missing))


@settings(max_examples=300)
@given(st.data(), st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(1, 9))
def test_equals_the_slow_packer(data, lengths, length):
    counter = iter(range(sum(lengths)))
    documents = [[next(counter) for _ in range(n)] for n in lengths]
    order = data.draw(st.permutations(range(len(documents))))
    order = order[: data.draw(st.integers(1, len(order)))]
    total = sum(len(documents[i]) for i in order)
    numbers = data.draw(st.lists(st.integers(0, total // length + 2), min_size=1, max_size=6))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.array([token for document in documents for token in document] or [0], dtype=np.uint16)
    stream = DocumentStream(tokens, offsets, np.array(order))
    assert stream.num_tokens == total
    packed = stream.pack(np.array(numbers), length, PAD)
    for row, number in enumerate(numbers):
        expected = slow_pack(documents, order, number, length)
        assert tuple(array[row].tolist() for array in packed) == expected
    assert all(array.dtype == np.int64 for array in packed)


def test_the_modules_example():
    tokens = np.array([10, 11, 12, 0, 20, 21, 0], dtype=np.int32)
    packed = DocumentStream(tokens, np.array([0, 4, 7]), np.array([0, 1])).pack(np.arange(2), 4, PAD)
    assert packed.tokens_BT.tolist() == [[10, 11, 12, 0], [20, 21, 0, PAD]]
    assert packed.labels_BT.tolist() == [[11, 12, 0, IGNORED], [21, 0, IGNORED, IGNORED]]
    assert packed.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
