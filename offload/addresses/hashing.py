"""Addresses: from token ids to rows of the memory tables, and the fingerprint that a checkpoint keeps of them.

B batch, T sequence, S sub-tables (orders x heads), L modules.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from kernels.hash import HashSpec, hash_ngrams
from offload.addresses.compression import CompressedVocabulary

_INT64_MAX = 2**63 - 1
_LAYER_SEED = 10007  # distance between the seeds of two layers, in the released form

# Up to 16 million rows per head, all primes together take a millisecond; with billions, each takes that long.
_next_prime = cache(sympy.nextprime)


class AddressBook:
    """The rows that the tokens of a batch read, in the tables of every Engram module.

    Bit-compatible with the released form (Engram, arXiv 2601.07372, section 2.2; DeepSeek-V4.1's tables): a module's
    table holds one sub-table for each order and head, of a prime number of rows that no other sub-table has.
    """

    def __init__(
        self,
        vocabulary: CompressedVocabulary,
        *,
        layers: Sequence[int],
        orders: Sequence[int],
        heads: int,
        rows_per_head: int | Sequence[int],
        seed: int = 0,
        cross_documents: bool = False,
    ) -> None:
        """Draws the multipliers and chooses the primes.

        Args:
            vocabulary: map from the batch's token ids to those that are hashed.
            layers: 0-based layer of every module; its number seeds the multipliers, its place decides the primes.
            orders: n-gram orders, at least 1, increasing.
            heads: sub-tables per order.
            rows_per_head: minimum rows of a sub-table, for all orders or for each; see `choose_primes`.
            seed: seed of the multipliers.
            cross_documents: whether n-grams reach into the previous document of the same sequence.

        Raises:
            ValueError: impossible numbers.
        """
        sizes = [rows_per_head] * len(orders) if isinstance(rows_per_head, int) else list(rows_per_head)
        _check(layers, orders, heads, sizes, seed)
        self._vocabulary = vocabulary
        multipliers = [draw_multipliers(layer, orders[-1], vocabulary.size, seed) for layer in layers]
        primes = choose_primes(len(layers), sizes, heads)
        moduli_LS = torch.tensor(primes)
        ends_LS = moduli_LS.cumsum(1)
        self._num_rows = ends_LS[:, -1].tolist()
        self._spec = HashSpec(
            torch.tensor(multipliers),
            moduli_LS,
            ends_LS - moduli_LS,
            tuple(orders),
            vocabulary.pad_id,
            cross_documents,
        )
        self._fingerprint = {
            "compressed_vocabulary": vocabulary.size,
            "compression_sha256": vocabulary.digest(),
            "pad_id": vocabulary.pad_id,
            "seed": seed,
            "layers": list(layers),
            "orders": list(orders),
            "heads": heads,
            "rows_per_head": sizes,
            "cross_documents": cross_documents,
            "multipliers": multipliers,
            "primes": primes,
        }

    @property
    def num_modules(self) -> int:
        """Number of Engram modules L."""
        return len(self._num_rows)

    def num_rows(self, module: int) -> int:
        """Rows of a module's table; `module` counts from 0 in the order of `layers`."""
        return self._num_rows[module]

    def all_rows(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Rows that every module reads: int64 [L, B, T, S]; a module's sub-tables are sorted by order, then by head.

        Args:
            tokens_BT: integer raw token ids, on the CPU.
            positions_BT: integer position of every token in its document, 0 at the first one in this sequence.

        Raises:
            ValueError: a token id is outside the vocabulary.
        """
        return hash_ngrams(self._vocabulary.compress(tokens_BT), positions_BT, self._spec)

    def check(self, tokens_BT: Tensor) -> None:
        """Refuses raw token ids (integers on the CPU), as `all_rows` does.

        Raises:
            ValueError: a token id is outside the vocabulary.
        """
        self._vocabulary.check(tokens_BT)

    def on(self, device: torch.device) -> "DeviceAddresses":
        """The same addresses, computed on `device`."""
        return DeviceAddresses(self._vocabulary.map.to(device), self._spec.to(device))

    def fingerprint(self) -> dict[str, Any]:
        """Every number that decides an address, as a JSON object. A checkpoint keeps it: tables are read only at the
        addresses they were written at."""
        return deepcopy(self._fingerprint)


@dataclass(frozen=True, eq=False)
class DeviceAddresses:
    """An `AddressBook` on a device: the same rows, by one kernel on a GPU.

    Args:
        compressed_V: int64, the compressed id of each of V token ids.
        spec: the hash. Both on the device.
    """

    compressed_V: Tensor
    spec: HashSpec

    def all_rows(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Like the book's, for tensors on the device. Token ids are not checked: that would make the host wait."""
        return hash_ngrams(tokens_BT, positions_BT, self.spec, compressed_V=self.compressed_V)


def draw_multipliers(layer: int, count: int, vocabulary_size: int, seed: int) -> list[int]:
    """Odd multipliers of a module, the first for the current token, the next for the one before, and so on.

    They are bounded so that the product with any compressed token id stays below 2^63.

    Args:
        layer: 0-based layer of the module.
        count: the largest n-gram order.
        vocabulary_size: number of compressed token ids.
        seed: the tables' seed.
    """
    half_bound = max(1, _INT64_MAX // vocabulary_size // 2)
    draws = np.random.default_rng(seed + _LAYER_SEED * layer).integers(0, half_bound, count)
    return [2 * draw + 1 for draw in draws.tolist()]


def choose_primes(num_modules: int, rows_per_head: Sequence[int], heads: int) -> list[list[int]]:
    """Rows of every sub-table: for each module, those of all orders and heads, heads innermost.

    Each is the smallest prime, not below the order's minimum, that no sub-table before it has. A minimum of 1 gives
    every sub-table of the order one row: the control that tells what n-grams are worth.

    Args:
        num_modules: number of modules.
        rows_per_head: minimum rows, for each order.
        heads: sub-tables per order.
    """
    taken: set[int] = set()

    def module_primes() -> Iterator[int]:
        for minimum in rows_per_head:
            if minimum == 1:
                yield from repeat(1, heads)
                continue
            prime = minimum - 1
            for _ in range(heads):
                prime = _next_prime(prime)
                while prime in taken:
                    prime = _next_prime(prime)
                taken.add(prime)
                yield prime

    return [list(module_primes()) for _ in range(num_modules)]


def _check(layers: Sequence[int], orders: Sequence[int], heads: int, sizes: Sequence[int], seed: int) -> None:
    rules = {
        f"layers {list(layers)} must be distinct, and 0 or more": layers
        and len(set(layers)) == len(layers)
        and min(layers) >= 0,
        f"orders {list(orders)} must be increasing, from 1": orders
        and sorted(set(orders)) == list(orders)
        and orders[0] >= 1,
        f"heads {heads} must be at least 1": heads >= 1,
        f"rows_per_head {list(sizes)} must be 1 or more, for each of {len(orders)} orders": len(sizes) == len(orders)
        and all(size >= 1 for size in sizes),
        f"seed {seed} must be 0 or more": seed >= 0,
    }
    for message, holds in rules.items():
        if not holds:
            raise ValueError(f"model.engram: {message}")
