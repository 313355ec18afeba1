"""Best-fit packing: documents side by side in sequences of equal length, none cut that fits into one.

Longest first, each piece goes where the least room is left that suffices (best-fit decreasing, as Ding et al. 2024,
arXiv 2404.10830, pack documents). A document longer than a sequence is cut into whole sequences and a rest. What
remains of a sequence is padding.

Which lengths share a sequence depends on how many pieces have each length, and is worked out once (`fit`), for all
pieces of a length at a time; an epoch's order then tells which piece is which. Pieces of a length go on filling one
sequence before another is opened, as the room that is left is always less than that of any other which suffices.

Legend: B sequences, T tokens of a sequence, L = T + 1 lengths, P pieces, F tokens of all pieces.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from train.data.batches.packing import Pieces


@dataclass
class _Alike:
    """Sequences that hold the same lengths: `holds` has `(length, how many)`."""

    count: int
    holds: list[tuple[int, int]]


class Fit(NamedTuple):
    """Sequences for a number of pieces of each length."""

    groups: list[_Alike]
    sequences: int
    padding: int
    """Tokens of all sequences that no piece fills."""


def fit(counts_L: np.ndarray) -> Fit:
    """Packs pieces, of which `counts_L[n]` have n tokens, into sequences of L - 1 tokens."""
    packing = _Packing(len(counts_L) - 1)
    for length in np.flatnonzero(counts_L)[::-1].tolist():
        packing.add(length, int(counts_L[length]))
    groups = [(free, group) for free, groups in packing.by_room.items() for group in groups]
    return Fit(
        [group for _, group in groups],
        sum(group.count for _, group in groups),
        sum(free * group.count for free, group in groups),
    )


class _Packing:
    """Sequences by the room that is left in them."""

    def __init__(self, room: int) -> None:
        self._room = room
        self.by_room: dict[int, list[_Alike]] = {}
        self._rooms: list[int] = []  # of those that have some, ascending

    def add(self, length: int, pieces: int) -> None:
        """Pieces of a length, no longer than those before them."""
        while pieces and (place := bisect_left(self._rooms, length)) < len(self._rooms):
            free = self._rooms.pop(place)
            for group in self.by_room.pop(free):
                pieces = self._fill(group, free, length, pieces)
        whole, rest = divmod(pieces, self._room // length)
        self._put(self._room, _Alike(whole, []), length, self._room // length)
        self._put(self._room, _Alike(int(rest > 0), []), length, rest)

    def _fill(self, group: _Alike, free: int, length: int, pieces: int) -> int:
        """Fills sequences of a group, as many as the pieces suffice for; returns how many are left."""
        each = free // length
        whole = min(group.count, pieces // each)
        rest = pieces - whole * each if whole < group.count else 0
        self._put(free, _Alike(whole, group.holds), length, each)
        self._put(free, _Alike(int(rest > 0), group.holds), length, rest)
        self._put(free, _Alike(group.count - whole - (rest > 0), group.holds), length, 0)
        return pieces - whole * each - rest

    def _put(self, free: int, group: _Alike, length: int, pieces: int) -> None:
        """Sequences, if any, each with so many more pieces."""
        if not group.count:
            return
        holds = [*group.holds, (length, pieces)] if pieces else group.holds
        left = free - pieces * length
        if left and left not in self.by_room:
            insort(self._rooms, left)
        self.by_room.setdefault(left, []).append(_Alike(group.count, holds))


def piece_counts(lengths_N: np.ndarray, room: int) -> np.ndarray:
    """How many pieces of each length, 0 to `room`, documents come to: int64 [L]."""
    counts_L = np.bincount(lengths_N % room, minlength=room + 1)
    counts_L[0] = 0
    counts_L[room] += int((lengths_N // room).sum())
    return counts_L


class BestFitStream:
    """Documents packed by best fit, those of a length in a given order.

    Attributes:
        num_tokens: their sum.
    """

    def __init__(self, offsets_N: np.ndarray, order_N: np.ndarray, length: int, made: Fit) -> None:
        """Args: int64 offsets of all documents (one more than documents); which documents, in order; T; their
        `fit`."""
        lengths_N = offsets_N[order_N + 1] - offsets_N[order_N]
        self.num_tokens = int(lengths_N.sum())
        whole_N = lengths_N // length
        number_P = np.arange(int(whole_N.sum())) - np.repeat(np.cumsum(whole_N) - whole_N, whole_N)
        starts = np.concatenate([np.repeat(offsets_N[order_N], whole_N) + number_P * length,
                                 offsets_N[order_N] + whole_N * length])  # fmt: skip
        lengths = np.concatenate([np.full(len(number_P), length), lengths_N % length])
        ends = np.concatenate([np.repeat(offsets_N[order_N + 1], whole_N), offsets_N[order_N + 1]])
        by_length = np.argsort(lengths, kind="stable")
        sorted_lengths = lengths[by_length]
        piece_P, sequence_P = _placed(made, np.searchsorted(sorted_lengths, np.arange(length + 2)), by_length)
        in_order = np.argsort(sequence_P, kind="stable")
        piece_P = piece_P[in_order]
        self._starts_P, self._lengths_P, self._ends_P = starts[piece_P], lengths[piece_P], ends[piece_P]
        self._first_B = np.searchsorted(sequence_P[in_order], np.arange(made.sequences + 1))

    def pieces(self, sequences_B: np.ndarray, length: int) -> Pieces:
        """What sequences by number, int64, in any order, are packed of; `length` is T."""
        first_B, end_B = self._first_B[sequences_B], self._first_B[sequences_B + 1]
        counts_B = end_B - first_B
        ends = np.cumsum(counts_B)
        piece_P = np.arange(int(ends[-1])) + np.repeat(first_B - ends + counts_B, counts_B)
        row_P = np.repeat(np.arange(len(sequences_B)), counts_B)
        starts_P, lengths_P = self._starts_P[piece_P], self._lengths_P[piece_P]
        return Pieces(starts_P, lengths_P, starts_P + lengths_P == self._ends_P[piece_P], row_P)


def _placed(made: Fit, first_L: np.ndarray, by_length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pieces, and the sequence of each: of every length the next ones, sequence after sequence."""
    next_L = first_L.copy()
    pieces, sequences, begin = [by_length[:0]], [by_length[:0]], 0
    for group in made.groups:
        for length, each in group.holds:
            places = begin + np.repeat(np.arange(group.count), each)
            pieces.append(by_length[next_L[length] : next_L[length] + len(places)])
            sequences.append(places)
            next_L[length] += len(places)
        begin += group.count
    return np.concatenate(pieces), np.concatenate(sequences)
