"""Everything a step will need from the tables, computed before the step starts.

Row addresses depend on token ids alone, so nothing here waits for the model: which rows each rank requests from which
owner, all split sizes of the exchanges, and the order in which the backward sums.

Shape suffixes: N lookups of a micro-batch, U rows that this rank requests, A rows that the ranks request from this one
(duplicates between ranks included), O rows that this rank owns and the step uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import RowIndex
from offload.plan.sharding import Sharding


class TokenBatch(Protocol):
    """A micro-batch, as far as the tables know it."""

    @property
    def tokens_BT(self) -> Tensor:
        """int64 token ids."""

    @property
    def positions_BT(self) -> Tensor:
        """int64 positions in the token's document."""


class Tokens(NamedTuple):
    """A micro-batch of tokens and positions alone."""

    tokens_BT: Tensor
    positions_BT: Tensor


Found = tuple[Tensor, tuple[RowIndex, ...]]
"""A module's unique rows, ascending: int64 [U], on the host. And every micro-batch's index into them."""


class Owed(NamedTuple):
    """A module's rows that ranks request from this one."""

    rows_O: Tensor
    """int64, each once, ascending, on the host."""
    indices_A: Tensor
    """`ModulePlan.owed_indices_A`; then its `owed_order_A`, and `owed_starts_O`."""
    order_A: Tensor
    starts_O: Tensor


class RowFinder(Protocol):
    """Finds the rows of lookups. Everything it returns is complete, in memory from which the model can be given it."""

    def of_batches(self, batches: Sequence[TokenBatch]) -> list[Found]:
        """The rows that micro-batches read, of each module.

        Raises:
            ValueError: a token id is outside the vocabulary.
        """

    def owed(self, rows_A: Tensor, world_size: int) -> Owed:
        """What this rank owes of one module: int64 `rows_A`, on the host, are requested from it by rank after rank."""


@dataclass(frozen=True)
class ModulePlan:
    """One Engram module's part of a step. Its tensors are where they were made: on the host, or on the device.

    Attributes:
        indices: for each micro-batch, which of this rank's U rows every lookup reads.
        asked: how many rows this rank requests from each rank; they are in this order among the U rows. Sums to U.
        owed: how many rows each rank requests from this one. Sums to A.
        owed_indices_A: int32, where those rows are among the module's `owned` rows; empty for a single rank, for which
            they are these, in order.
        owed_order_A: int32, those rows sorted by index, in rank order within one; empty for a single rank.
        owed_starts_O: int32, where in this order each of the module's `owned` rows starts; empty for a single rank.
        owned: the module's part of the step's O rows.
    """

    indices: tuple[RowIndex, ...]
    asked: list[int]
    owed: list[int]
    owed_indices_A: Tensor
    owed_order_A: Tensor
    owed_starts_O: Tensor
    owned: slice

    def by_rank(self, values_O: Tensor) -> tuple[Tensor, ...]:
        """Of values of the module's `owned` rows, on any device, those that each rank requests."""
        if len(self.owed) == 1:
            return (values_O,)
        return values_O[self.owed_indices_A.to(values_O.device)].split(self.owed)

    def map(self, change: Callable[[Tensor], Tensor]) -> "ModulePlan":
        """The plan with every tensor replaced, in an order that is always the same."""
        indices = tuple(index.map(change) for index in self.indices)
        indices_A, order_A, starts_O = map(change, (self.owed_indices_A, self.owed_order_A, self.owed_starts_O))
        return replace(self, indices=indices, owed_indices_A=indices_A, owed_order_A=order_A, owed_starts_O=starts_O)


@dataclass(frozen=True)
class Plan:
    """A step, seen from one rank.

    Attributes:
        rows_O: int64, ascending, on the host: places in this rank's shard of the rows that the step uses.
        most_rows: the largest number of such rows that any rank has: the same on every rank.
        modules: the Engram modules' parts.
        batches: the micro-batches that it was made for.
        packed: int32: the memory of all tensors of its modules, one after another; None where each has its own.
    """

    rows_O: Tensor
    most_rows: int
    modules: tuple[ModulePlan, ...]
    batches: Sequence[TokenBatch]
    packed: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of its modules, all int32, in an order that is always the same."""
        found: list[Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def map(self, change: Callable[[Tensor], Tensor]) -> "Plan":
        """The plan with every tensor of its modules replaced, in the order of `tensors`."""
        return replace(self, modules=tuple(part.map(change) for part in self.modules), packed=None)


def make_plan(
    batches: Sequence[TokenBatch],
    finder: RowFinder,
    sharding: Sharding,
    rank: int,
    group: dist.ProcessGroup | None,
) -> Plan:
    """Plans the rows of one step's micro-batches.

    Collective over `group`, a group of host-side communication: every rank must plan the same steps in the same order.
    """
    modules = range(len(sharding.num_rows))
    uniques, indices = zip(*finder.of_batches(batches), strict=True)
    counts_WM = torch.stack([sharding.counts(module, uniques[module]) for module in modules], dim=1)
    owed_WM, owed_rows = _exchange_ids(uniques, counts_WM, group)
    plans, parts_O, start = [], [], 0
    for module in modules:
        owned, indices_A, order_A, starts_O = finder.owed(owed_rows[module], sharding.world_size)
        part = slice(start, start := start + len(owned))
        asked, owed = counts_WM[:, module].tolist(), owed_WM[:, module].tolist()
        plans.append(ModulePlan(indices[module], asked, owed, indices_A, order_A, starts_O, part))
        parts_O.append(sharding.to_shard(module, rank, owned))
    rows_O = torch.cat(parts_O)
    return Plan(rows_O, _largest(len(rows_O), sharding.world_size, group), tuple(plans), batches)


def _largest(value: int, world_size: int, group: dist.ProcessGroup | None) -> int:
    if world_size == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return int(largest)


def _exchange_ids(
    uniques: Sequence[Tensor], counts_WM: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, list[Tensor]]:
    """Tells each owner the rows requested from it; returns how many each rank requests here, and which, by module."""
    if counts_WM.shape[0] == 1:
        return counts_WM, list(uniques)
    owed_WM = torch.empty_like(counts_WM)
    dist.all_to_all_single(owed_WM, counts_WM.contiguous(), group=group)
    by_owner = zip(
        *(unique.split(counts.tolist()) for unique, counts in zip(uniques, counts_WM.T, strict=True)), strict=True
    )
    sent = torch.cat([rows for owner in by_owner for rows in owner])
    received = sent.new_empty(int(owed_WM.sum()))
    dist.all_to_all_single(received, sent, owed_WM.sum(1).tolist(), counts_WM.sum(1).tolist(), group=group)
    parts = received.split(owed_WM.flatten().tolist())
    num_modules = counts_WM.shape[1]
    return owed_WM, [torch.cat(parts[module::num_modules]) for module in range(num_modules)]
