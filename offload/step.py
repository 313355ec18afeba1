"""A training step as the tables see it: its micro-batches, the rows of their tokens, one update of these rows.

Shape suffixes as in `offload.plan.plan`, and D columns of a row, W words of a record.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import recycled
from kernels.gather import RowIndex
from kernels.gather.values import RowValues
from kernels.threads import on_one_thread, split_rows
from offload.device.sender import Sender
from offload.gradients import ModuleGradient
from offload.observer import Observer
from offload.plan.exchange import exchange_values
from offload.plan.plan import Plan, TokenBatch
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout
from offload.rows.updater import RowUpdater
from offload.window.interface import RowStore


@dataclass(frozen=True)
class Rows:
    """The rows of some micro-batches' tokens.

    Attributes:
        found: for each Engram module, this rank's unique rows.
        indices: for each micro-batch and module, which of those rows every lookup reads.
    """

    found: list[RowValues]
    indices: list[list[RowIndex]]

    @property
    def values(self) -> list[Tensor]:
        """For each Engram module, this rank's unique rows: fp32 [U, D]. Those that are looked up where they are stored
        are copied."""
        return [rows.tensor() for rows in self.found]

    def of(self, micro_batch: int) -> list[tuple[Tensor, RowIndex]]:
        """What a micro-batch reads: for each Engram module the rows, and which of them its lookups read."""
        return list(zip(self.values, self.indices[micro_batch], strict=True))


@dataclass(frozen=True)
class StepRows(Rows):
    """Those of a step that trains.

    Attributes:
        gradients: where each module's go.
    """

    gradients: list[ModuleGradient]

    def of(self, micro_batch: int) -> list[tuple[Tensor, RowIndex]]:
        """What a micro-batch reads: for each Engram module its rows alone, as an autograd leaf, and which of them its
        lookups read."""
        return [gradient.leaf(micro_batch) for gradient in self.gradients]


@dataclass(frozen=True)
class RankShard:
    """What this rank's steps share: its rows, how they are updated, and the ranks they are exchanged with.

    Attributes:
        store: the rows' records.
        sender: of other numbers to the device.
        updater: of the rows.
        layout: of the records.
        sharding, rank: who owns which rows.
        group: the ranks, with communication on the device; None for all ranks.
        device: where the model computes.
        exchange_dtype: in which values travel from their owners.
        observer: is told about everything.
    """

    store: RowStore
    sender: Sender
    updater: RowUpdater
    layout: RecordLayout
    sharding: Sharding
    rank: int
    group: dist.ProcessGroup | None
    device: torch.device
    exchange_dtype: torch.dtype
    observer: Observer

    def rows_of(self, plan: Plan, owned: RowValues) -> Rows:
        """Exchanges the rows of a plan, whose modules' tensors are on the device. Collective."""
        found = [
            exchange_values(part, owned.only(part.owned), self.group, self.exchange_dtype) for part in plan.modules
        ]
        by_batch = zip(*(part.indices for part in plan.modules), strict=True)
        return Rows(found, [list(modules) for modules in by_batch])


class Step:
    """A step that has begun. It ends once: applied or skipped.

    Args:
        number: of the step, from 0.
        plan: the step's, as it was made.
        there: the same, with its modules' tensors on the device.
        slots_O: where the rows' records are in the store, on the device.
        shard: this rank's.
        finish: called at the end with whether the rows were updated.
    """

    def __init__(
        self,
        number: int,
        plan: Plan,
        there: Plan,
        slots_O: Tensor,
        shard: RankShard,
        finish: Callable[[bool], None],
    ) -> None:
        self.number = number
        self._plan, self._slots_O = plan, slots_O
        self._shard, self._finish = shard, finish
        self._gradient_OD: Tensor | None = None
        self._ended = False
        self._read = shard.updater.read(shard.store.records, slots_O)
        rows = shard.rows_of(there, self._read.weights)
        parts = zip(there.modules, rows.found, strict=True)
        gradients = [ModuleGradient(part, values, shard.group) for part, values in parts]
        self.rows = StepRows(rows.found, rows.indices, gradients)
        """This rank's, to be read until the step ends."""
        shard.observer.read(number, plan, slots_O, self.rows)

    @property
    def batches(self) -> Sequence[TokenBatch]:
        """This rank's micro-batches, as its loader gave them: the very ones that the rows were planned for."""
        return self._plan.batches

    def reduce(self) -> Tensor:
        """Sums the rows' gradients at their owners: sent once the last micro-batch's were there, else now. Collective.

        Returns:
            fp64 scalar: the squared norm of the gradient of all rows, averaged over ranks; the same on every rank.

        Raises:
            RuntimeError: the step has ended.
        """
        self._require_open()
        shard = self._shard
        parts = [gradient.sum() for gradient in self.rows.gradients]
        shard.observer.reduced(self.number, self._plan, [gradient.total for gradient in self.rows.gradients], parts)
        self._gradient_OD = parts[0] if len(parts) == 1 else _joined(parts)
        with on_one_thread():
            norm_squared = torch.linalg.vecdot(self._gradient_OD, self._gradient_OD).sum(dtype=torch.float64)
        world_size = shard.sharding.world_size
        if world_size > 1:
            dist.all_reduce(norm_squared, group=shard.group)
        return norm_squared / world_size**2

    def apply(self, *, lr: float, gradient_scale: float = 1.0) -> None:
        """Updates each row of the step once, at its owner.

        Args:
            lr: the backbone's learning rate of this step; the rows' factor is applied here.
            gradient_scale: the gradient is first multiplied by it (clipping).

        Raises:
            RuntimeError: gradients were not reduced, or the step has ended.
        """
        self._require_open()
        if self._gradient_OD is None:
            raise RuntimeError("gradients were not reduced")
        shard, plan = self._shard, self._plan
        scale = gradient_scale / shard.sharding.world_size
        row_ids = None
        if shard.layout.packed:  # they key the rounding
            (row_ids,) = shard.sender.send(shard.sharding.global_ids(shard.rank, plan.rows_O)).take()
        shard.updater.update_at(self._read, self._gradient_OD, lr, row_ids, gradient_scale=scale)
        shard.observer.updated(self.number, plan, self._slots_O, lr, scale)
        self._end(updated=True)

    def skip(self) -> None:
        """Ends the step without a trace in any row.

        Raises:
            RuntimeError: the step has ended.
        """
        self._require_open()
        self._end(updated=False)

    def _end(self, *, updated: bool) -> None:
        self._ended = True
        del self._read  # of the store's records: between steps it may replace them
        self._finish(updated)

    def _require_open(self) -> None:
        if self._ended:
            raise RuntimeError(f"step {self.number} was applied or skipped before")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].device.type != "cpu":
        return torch.cat(list(parts))
    # In memory of an earlier step: fresh memory would cost page faults.
    joined_OD = recycled.empty((sum(map(len, parts)), parts[0].shape[1]), parts[0].dtype)
    for part_PD, copy_PD in zip(parts, joined_OD.split([len(part) for part in parts]), strict=True):
        _copy(part_PD, copy_PD)
    return joined_OD


def _copy(source_PD: Tensor, target_PD: Tensor) -> None:
    source, target = source_PD.numpy(), target_PD.numpy()
    split_rows(len(source), lambda start, end: np.copyto(target[start:end], source[start:end]))
