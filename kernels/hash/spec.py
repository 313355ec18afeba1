"""The numbers of a hash: S sub-tables (orders x heads), K multipliers (the largest order), L modules."""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HashSpec:
    """The numbers that turn token ids into rows, of one module or of several that hash the same tokens.

    Sub-tables are sorted by n-gram order, then by head. The tensors of L modules are stacked in a leading dimension;
    those of a single module have none.
    """

    multipliers_LK: Tensor
    """int64 [K] or [L, K]; the first multiplies the current token. Every product with a token id fits in int64."""
    moduli_LS: Tensor
    """int64 [S] or [L, S]; the rows of every sub-table, a prime number or 1."""
    offsets_LS: Tensor
    """int64 [S] or [L, S]; the row at which every sub-table starts."""
    orders: tuple[int, ...]
    """N-gram orders, at least 1, increasing; the last is K."""
    pad_id: int
    """The (compressed) token id that is used where an n-gram reaches back beyond its document."""
    cross_documents: bool = False
    """Whether an n-gram may reach into the previous document of the same sequence."""

    def to(self, device: torch.device | str) -> Self:
        """The same numbers with their tensors on `device`."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return type(self)(**{**moved, **tensors})

    @cached_property
    def reciprocals_LS(self) -> Tensor:
        """floor((2^64 - 1) / modulus) of every sub-table, shaped as the moduli: an unsigned word's bits, in int64."""
        largest = 2**63 - 1  # 2^64 - 1 = 2 * largest + 1, computed without exceeding int64
        rest_LS = largest % self.moduli_LS
        carry_LS = rest_LS >= self.moduli_LS - 1 - rest_LS
        return largest // self.moduli_LS * 2 + carry_LS
