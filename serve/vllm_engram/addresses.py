"""Hashed token ids to the rows that they read (docs/serve.md has the formula).

Shape suffixes: T tokens, N ids of an n-gram, S sub-tables (orders x heads).
"""

from typing import Any

import torch
from torch import Tensor, nn


class Addresses(nn.Module):
    """Where the tokens' n-grams lie in every table.

    Args:
        numbers: the section `engram.addresses` of an export's config.
    """

    def __init__(self, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.pad_id: int = numbers["pad_id"]
        self.orders, self.heads = numbers["orders"], numbers["heads"]
        self.multipliers: list[list[int]] = numbers["multipliers"]
        for module, primes in enumerate(numbers["primes"]):
            self.register_buffer(f"primes_{module}", torch.tensor(primes), persistent=False)

    def forward(self, ids_TN: Tensor) -> list[Tensor]:
        """For each Engram module, the numbers [T, S] of the rows that the tokens read.

        Args:
            ids_TN: hashed ids (int64) of a token and of those before it, its own first.
        """
        return [self._rows(ids_TN, module) for module in range(len(self.multipliers))]

    def _rows(self, ids_TN: Tensor, module: int) -> Tensor:
        mix_T, mixes = torch.zeros_like(ids_TN[:, 0]), []
        for back, multiplier in enumerate(self.multipliers[module]):
            mix_T = mix_T ^ (ids_TN[:, back] * multiplier)  # below 2**63 by the choice of the multipliers
            mixes += [mix_T] * self.heads if back + 1 in self.orders else []
        primes_S = self.get_buffer(f"primes_{module}")
        return torch.stack(mixes, dim=-1) % primes_S + primes_S.cumsum(0) - primes_S
