"""Packing against a packer in plain Python that walks token by token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.batches.best_fit import BestFitStream, fit, piece_counts
from train.data.batches.packing import IGNORED, DocumentStream, pack

PAD = 999
PAD_BEYOND = 10**6


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
    stream = DocumentStream(offsets, np.array(order))
    assert stream.num_tokens == total
    packed = pack(tokens, stream.pieces(np.array(numbers), length), len(numbers), length, PAD)
    for row, number in enumerate(numbers):
        expected = slow_pack(documents, order, number, length)
        assert tuple(array[row].tolist() for array in packed) == expected
    assert all(array.dtype == np.int64 for array in packed)


def test_the_modules_example():
    tokens = np.array([10, 11, 12, 0, 20, 21, 0], dtype=np.int32)
    pieces = DocumentStream(np.array([0, 4, 7]), np.array([0, 1])).pieces(np.arange(2), 4)
    packed = pack(tokens, pieces, 2, 4, PAD)
    assert packed.tokens_BT.tolist() == [[10, 11, 12, 0], [20, 21, 0, PAD]]
    assert packed.labels_BT.tolist() == [[11, 12, 0, IGNORED], [21, 0, IGNORED, IGNORED]]
    assert packed.positions_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]


def slow_best_fit(lengths, room):
    """Rooms left, by piece after piece."""
    pieces = sorted(
        (part for n in lengths for part in [room] * (n // room) + [n % room] * (n % room > 0)), reverse=True
    )
    left = []
    for piece in pieces:
        best = min((free, place) for place, free in enumerate([*left, room]) if free >= piece)[1]
        left = [*left, room][: max(len(left), best + 1)]
        left[best] -= piece
    return left


LENGTHS = st.lists(st.integers(0, 25), min_size=1, max_size=40).filter(any)


@given(LENGTHS, st.integers(1, 12))
def test_best_fit_leaves_the_rooms_that_piece_after_piece_leaves(lengths, room):
    made = fit(piece_counts(np.array(lengths), room))
    rooms = slow_best_fit(lengths, room)
    assert (made.sequences, made.padding) == (len(rooms), sum(rooms))
    found = [room - sum(length * n for length, n in g.holds) for g in made.groups for _ in range(g.count)]
    assert sorted(found) == sorted(rooms)


@settings(max_examples=200)
@given(st.data(), LENGTHS, st.integers(1, 12))
def test_best_fit_has_every_token_once_and_cuts_only_what_is_longer_than_a_sequence(data, lengths, room):
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(sum(lengths), dtype=np.int32)
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    made = fit(piece_counts(np.array(lengths), room))
    stream = BestFitStream(offsets, order, room, made)
    pieces = stream.pieces(np.arange(made.sequences)[::-1].copy(), room)
    packed = pack(tokens, pieces, made.sequences, room, PAD_BEYOND)
    text = packed.tokens_BT != PAD_BEYOND
    assert sorted(packed.tokens_BT[text]) == tokens.tolist()
    assert (packed.labels_BT[~text] == IGNORED).all()
    ends = set((offsets[1:] - 1).tolist())
    begins = dict.fromkeys(offsets[:-1][np.diff(offsets) > 0].tolist())
    for ids, labels, positions in zip(*packed, strict=True):
        for place, token in enumerate(ids):
            if token == PAD_BEYOND:
                continue
            assert labels[place] == (IGNORED if token in ends else token + 1)
            if positions[place]:
                assert ids[place - 1] == token - 1
                assert positions[place] == positions[place - 1] + 1
            else:
                begin = max(start for start in begins if start <= token)
                assert (token - begin) % room == 0, "a document that would have fitted was cut"


def test_best_fit_takes_the_documents_of_a_length_in_the_order_given():
    offsets = np.arange(0, 21, 4)
    made = fit(piece_counts(np.full(5, 4), 8))
    streams = [BestFitStream(offsets, np.array(order), 8, made) for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1])]
    rows = [
        sorted(pack(np.arange(20), stream.pieces(np.arange(3), 8), 3, 8, -1).tokens_BT[:, ::4].tolist())
        for stream in streams
    ]
    assert rows == [[[0, 4], [8, 12], [16, -1]], [[0, 12], [4, -1], [16, 8]]]
