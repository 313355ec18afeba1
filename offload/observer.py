"""Observers of steps: told of each stage of the very steps that train, after it happened."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from offload.host.file_records import FileRecords
from offload.plan.plan import Plan


class Values(Protocol):
    """The rows that a step or an evaluation handed out."""

    @property
    def values(self) -> Sequence[Tensor]:
        """For each module, this rank's unique rows: fp32 [U, D]."""


class Observer:
    """Does nothing. What is called here is called by all ranks in the same order, so it may be collective."""

    def planned(self, step: int, plan: Plan) -> None:
        """A step is about to use its plan."""

    def read(self, step: int, plan: Plan, slots_O: Tensor, rows: Values) -> None:
        """A step's rows are at `slots_O` of the store's records, and were handed out as `rows`."""

    def reduced(self, step: int, plan: Plan, gradients: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """For each module, this rank's gradients [U, D] as they were sent, and the sums of the rows that it owns."""

    def updated(self, step: int, plan: Plan, slots_O: Tensor, lr: float, gradient_scale: float) -> None:
        """A step's rows were updated with `gradient_scale` times the sums."""

    def finished(self, step: int, plan: Plan) -> None:
        """A step released its rows, updated or not."""

    def looked_up(self, step: int, plan: Plan, records_OW: Tensor, rows: Values) -> None:
        """Rows of micro-batches that belong to no training step were read after `step`."""

    def saved(self, records_RW: Tensor | FileRecords) -> None:
        """The whole shard's records, as they are about to be saved."""

    def loaded(self, rows: Tensor, records_UW: Tensor) -> None:
        """Records of `rows` (places in the shard) were overwritten before the first step."""
