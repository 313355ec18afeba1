"""Which source each sequence of a mixture comes from: a pure function of the sequence's number, without state.

Sources are the leaves of a binary tree, built as Huffman's from their weights. A node of weight W sends the n-th
sequence that reaches it to its left child, of weight L, if round((n+1) L/W) is one more than round(n L/W): the two
children's turns are as even as whole numbers allow, and what reaches a child is numbered without gaps. So a sequence's
source, and its index among that source's, follow from its number by a few divisions, and so do counts up to a number.

Of any stretch of sequences each node's share is less than one off. Errors shrink on their way down: a node weighs at
most half of its grandparent (its uncle is no lighter: Huffman joins the two lightest first), so of any stretch each
source has its share to within less than 1 + 1 + 1/2 + 1/2 + ... = 4 sequences. Where the weights' reduced sum divides
the stretch's length, each node's pattern repeats within it, and shares are exact: those in thousandths over any
thousand sequences.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_PARTS = 10**9
"""Weights whose common denominator is larger are rounded to this many parts: products stay within 64 bits."""


class _Node(NamedTuple):
    left: "_Node | int"
    right: "_Node | int"
    left_weight: int
    weight: int

    def lefts(self, number: np.ndarray) -> np.ndarray:
        """How many of the first `number` sequences go left."""
        whole, rest = number // self.weight, number % self.weight
        return whole * self.left_weight + (rest * self.left_weight + self.weight // 2) // self.weight


class Mixture:
    """Sources with shares.

    Attributes:
        shares: whole numbers, one a source, without a common divisor; 0 for a source that is not read.
    """

    def __init__(self, weights: Sequence[float | int]) -> None:
        """Args: the sources' weights, in any unit, none negative and at least one above 0; decimals are taken exactly.

        Raises:
            ValueError: no weight above 0, or a weight that is none.
        """
        self.shares = _whole(weights)
        heap: list[tuple[int, int, _Node | int]] = [
            (share, number, number) for number, share in enumerate(self.shares) if share
        ]
        heapq.heapify(heap)
        for number in range(len(self.shares), len(self.shares) + len(heap) - 1):
            (left_weight, _, left), (right_weight, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            weight = left_weight + right_weight
            heapq.heappush(heap, (weight, number, _Node(left, right, left_weight, weight)))
        self._root = heap[0][2]

    def locate(self, numbers_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sequences by number, from 0: the source of each, and its index among that source's; both int64 [B]."""
        source_B, index_B = np.empty(len(numbers_B), np.int64), np.empty(len(numbers_B), np.int64)
        pending = [(self._root, np.arange(len(numbers_B)), np.asarray(numbers_B, np.int64))]
        while pending:
            node, places, numbers = pending.pop()
            if isinstance(node, int):
                source_B[places], index_B[places] = node, numbers
                continue
            before = node.lefts(numbers)
            left = node.lefts(numbers + 1) > before
            pending.append((node.left, places[left], before[left]))
            pending.append((node.right, places[~left], (numbers - before)[~left]))
        return source_B, index_B

    def counts(self, number: int) -> list[int]:
        """How many of the first `number` sequences come from each source."""
        found = [0] * len(self.shares)
        for source, count in _leaves(self._root, number):
            found[source] = count
        return found


def _leaves(node: _Node | int, number: int) -> Iterator[tuple[int, int]]:
    if isinstance(node, int):
        yield node, number
        return
    left = int(node.lefts(np.array(number, np.int64)))
    yield from _leaves(node.left, left)
    yield from _leaves(node.right, number - left)


def _whole(weights: Sequence[float | int]) -> tuple[int, ...]:
    """Weights as whole numbers in the same proportions, to a billionth."""
    # By their shortest decimal form: 0.1 is meant, not the binary number next to it.
    parts = [Fraction(repr(weight)) for weight in weights]
    if not parts or min(parts) < 0 or not sum(parts):
        raise ValueError(f"weights {list(weights)}: none may be negative, and one must be above 0")
    denominator = math.lcm(*(part.denominator for part in parts))
    numbers = [int(part * denominator) for part in parts]
    divisor = math.gcd(*numbers)
    numbers = [number // divisor for number in numbers]
    if (total := sum(numbers)) > _PARTS:
        numbers = [max(1, round(Fraction(number * _PARTS, total))) if number else 0 for number in numbers]
    return tuple(numbers)
