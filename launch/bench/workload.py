"""What the contenders look up: Zipf-distributed ids, the same for all of them, and the gradient that comes back.

Shape suffixes: N lookups of a step, T tokens of a step, S rows that a token looks up, P steps drawn, D columns.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from offload.plan.plan import Tokens

_SLOTS = 16
_GOLDEN_RATIO = 0.6180339887


@dataclass(frozen=True)
class Workload:
    """The lookups of every step.

    Args:
        lookups: rows looked up in a step, duplicates included (N).
        rows: rows of the table.
        dim: columns of a row (D).
        zipf: exponent of the distribution, above 1: the k-th most frequent row has probability ~ k^-zipf.
        seed: of the ids.
        spread: the table has this many times `rows`, and the same ids stand this far apart in it.
        tail: rows that the table has beyond those.
        rank: each of several ranks looks up its own ids.
    """

    lookups: int = 262_144
    rows: int = 4_000_000
    dim: int = 80
    zipf: float = 1.2
    seed: int = 0
    spread: int = 1
    tail: int = 0
    rank: int = 0

    @property
    def table_rows(self) -> int:
        """Rows of the table, those that are never looked up included."""
        return self.rows * self.spread + self.tail

    @property
    def lookups_per_token(self) -> int:
        """Rows that a token looks up (S): 16 as in the paper, or the next smaller number that divides the lookups."""
        return math.gcd(self.lookups, _SLOTS)

    @property
    def tokens(self) -> int:
        """Tokens of a step (T)."""
        return self.lookups // self.lookups_per_token

    def ids(self, step: int) -> Tensor:
        """int64 [N]: a pure function of (seed, rank, step)."""
        # Draws beyond the table wrap around; frequent rows are scattered over the table, as a hash does.
        ranks = np.random.default_rng((self.seed, self.rank, step)).zipf(self.zipf, self.lookups) % self.rows
        return torch.from_numpy(ranks * self._scatter % self.rows * self.spread)

    def gradient(self) -> Tensor:
        """fp32 [N, D]: what arrives at every lookup, at every step."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.lookups, self.dim, generator=generator).mul_(1e-3)

    @cached_property
    def _scatter(self) -> int:
        step = max(1, int(self.rows * _GOLDEN_RATIO))
        while math.gcd(step, self.rows) > 1:
            step += 1
        return step


class DrawnSteps:
    """The ids of all steps of a measurement, drawn before it starts.

    Also an address book as `offload.tables.EngramTables` takes it, for one module: a token id is the number of a
    token among all steps' tokens, and its rows are those that were drawn for it.

    Args:
        workload: what to draw from.
        steps: how many steps (P).
    """

    num_modules = 1

    def __init__(self, workload: Workload, steps: int) -> None:
        self.workload, self.steps = workload, steps
        self.ids_PN = torch.stack([workload.ids(step) for step in range(steps)])

    @property
    def most_unique(self) -> int:
        """The largest number of distinct rows that a step looks up."""
        return max(self.unique_counts)

    @cached_property
    def unique_counts(self) -> list[int]:
        """Distinct rows of each step."""
        return [len(ids_N.unique()) for ids_N in self.ids_PN]

    def num_rows(self, module: int) -> int:
        """Rows of the table."""
        return self.workload.table_rows

    def rows(self, module: int, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Rows of every token: int64 [B, T, S]."""
        return self.ids_PN.view(-1, self.workload.lookups_per_token)[tokens_BT]

    def all_rows(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        """Rows of every token, of all modules: int64 [1, B, T, S]."""
        return self.rows(0, tokens_BT, positions_BT)[None]

    def batches(self, step: int) -> list[Tokens]:
        """The step's one micro-batch: token ids and positions, both int64 [1, T]."""
        tokens = self.workload.tokens
        positions = torch.arange(tokens)
        return [Tokens((positions + step * tokens)[None], positions[None])]
