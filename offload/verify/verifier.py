"""Verify mode: every step is computed a second time, simply and one thing after another, and compared.

What is recomputed: the plan, from the token ids and one plain exchange of row ids; the rows' records as a step gets
them, from a shadow that no window, fetch or write-back ever touches; what each rank received, which is sent back to the
rows' owners; the sum of the gradients; the update; and, after each step, what host memory and the window hold. The
first difference stops the run: `VerifyError` names step, row, owner and both values.

Shape suffixes as in `offload.plan.plan`; X words of a record with fp32 weights.
"""

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import row_index
from offload.addresses.hashing import AddressBook
from offload.host.file_records import FileRecords
from offload.observer import Observer, Values
from offload.plan.plan import ModulePlan, Plan
from offload.rows.records import RowInit
from offload.rows.updater import RowUpdater
from offload.step import RankShard
from offload.verify.shadow import Shadow, VerifyError, difference

SAMPLE_ROWS = 4096
"""Rows read again after each step, beside those of the step and those that left the window: all rows take turns."""


class Verifier(Observer):
    """Recomputes every step beside the tables. All of it is collective.

    Any difference is a `VerifyError` of the rank that owns the row.

    Args:
        shard: this rank's. A copy of its updater, taken when the first rows are handed out, updates the shadow.
        addresses: from token ids to rows.
        init: the rows' values before their first update.
    """

    def __init__(self, shard: RankShard, addresses: AddressBook, init: RowInit) -> None:
        self._shard, self._addresses = shard, addresses
        self._sharding, self._rank, self._device = shard.sharding, shard.rank, shard.device
        self._shadow = Shadow(shard.layout, init, shard.sharding, shard.rank)
        self._updater: RowUpdater | None = None
        self._truth_OX = torch.empty(0)
        self._gradient_OD = torch.empty(0)
        self._in_host = torch.zeros(0, dtype=torch.bool)
        self._next_sampled = 0
        self._last = "before the first step"

    def planned(self, step: int, plan: Plan) -> None:
        """Compares a plan with its micro-batches, and with what the other ranks request from this one."""
        self._check_plan(_name(step), plan)

    def read(self, step: int, plan: Plan, slots_O: Tensor, rows: Values) -> None:
        """Compares the step's rows in the store, brought up to date, and as each rank received them."""
        self._last = _name(step)
        records_OW = self._stored(slots_O)
        self._require(plan.rows_O, records_OW, "as fetched for the step")
        self._truth_OX = self._compare_rows(self._last, plan, self._caught_up(records_OW), rows.values)

    def reduced(self, step: int, plan: Plan, gradients: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Sums the ranks' gradients again, in rank order, and compares."""
        for part, gradient, total_OD in zip(plan.modules, gradients, sums, strict=True):
            again_OD = torch.zeros_like(total_OD)
            received = self._swap(list(gradient.split(part.asked)))
            indices_O = torch.arange(len(total_OD), device=self._device)
            for values, indices in zip(received, part.by_rank(indices_O), strict=True):
                again_OD[indices] = again_OD[indices] + values
            self._require_equal(f"{_name(step)}, its gradient", plan.rows_O[part.owned], total_OD, again_OD)
        # The tables scale theirs in place.
        self._gradient_OD = torch.cat(list(sums)).clone()

    def updated(self, step: int, plan: Plan, slots_O: Tensor, lr: float, gradient_scale: float) -> None:
        """Applies the step to the shadow, and compares."""
        assert self._updater is not None
        row_ids = self._sharding.global_ids(self._rank, plan.rows_O).to(self._device)
        self._updater.update(self._truth_OX, self._gradient_OD * gradient_scale, lr, row_ids)
        records_OX = self._shard.layout.unpack(self._stored(slots_O))
        self._shadow.require(plan.rows_O, records_OX, self._truth_OX, f"{_name(step)}, after its update")
        self._shadow.put(plan.rows_O, self._shadow.layout.pack(self._truth_OX))

    def finished(self, step: int, plan: Plan) -> None:
        """Reads rows again: the step's, those that left the window since the last one, and some others."""
        store = self._shard.store
        self._require(plan.rows_O, store.read(plan.rows_O), "in the window after the step")
        for others in (self._rows_that_left(), self._sample()):
            self._require(others, store.read(others), "read again after the step")

    def looked_up(self, step: int, plan: Plan, records_OW: Tensor, rows: Values) -> None:
        """Compares the plan and the rows of micro-batches that belong to no training step."""
        when = f"evaluation after {_name(step)}"
        self._require(plan.rows_O, records_OW, "as looked up after the step")
        self._check_plan(when, plan)
        self._compare_rows(when, plan, self._caught_up(records_OW), rows.values)

    def saved(self, records_RW: Tensor | FileRecords) -> None:
        """Compares rows that must have been updated, and those that say so: nothing may be written to any other."""
        stored = self._shadow.layout.versions(records_RW, 0, len(records_RW)).nonzero().flatten()
        for rows in (self._shadow.updated(0, self._shadow.num_updated), stored):
            for some in rows.split(SAMPLE_ROWS):
                self._require(some, records_RW.index_select(0, some.to(records_RW.device)), "in host memory, as saved")

    def loaded(self, rows: Tensor, records_UW: Tensor) -> None:
        """The shadow gets them too."""
        self._shadow.put(rows, records_UW)

    def _check_plan(self, when: str, plan: Plan) -> None:
        plan = plan.map(Tensor.cpu)
        rows = [self._addresses.all_rows(batch.tokens_BT, batch.positions_BT) for batch in plan.batches]
        used = []
        for module, part in enumerate(plan.modules):
            names_U = self._asked_rows(when, part, [micro_batch[module] for micro_batch in rows])
            asked = self._swap(list(names_U.split(part.asked)))
            places = [self._sharding.to_shard(module, self._rank, ids) for ids in asked]
            planned = part.by_rank(plan.rows_O[part.owned])
            for rank, (found, expected) in enumerate(zip(planned, places, strict=True)):
                if not torch.equal(found, expected):
                    raise VerifyError(
                        f"offload.verify: {when}: rank {self._rank} plans to send rank {rank} other rows of module "
                        f"{module} than it asks for: {_first_difference(found, expected)}"
                    )
            used += places
        if not torch.equal(torch.cat(used).unique(), plan.rows_O.sort().values):
            raise VerifyError(f"offload.verify: {when}: rank {self._rank} plans other rows than the ranks ask for")

    def _stored(self, slots_O: Tensor) -> Tensor:
        """A copy of a step's records as they stand in the store."""
        return self._shard.store.records.index_select(0, slots_O)

    def _caught_up(self, records_OW: Tensor) -> Tensor:
        records_OX = self._shard.layout.unpack(records_OW)
        self._shard.updater.catch_up(records_OX)
        return records_OX

    def _require(self, rows: Tensor, records_UW: Tensor, what: str) -> None:
        self._shadow.require(rows, records_UW, self._shadow.records(rows), f"{self._last}, {what}")

    def _rows_that_left(self) -> Tensor:
        """The updated rows whose authority is host memory since this step: their write-back has just landed."""
        updated = self._shadow.updated(0, self._shadow.num_updated)
        in_host = self._shard.store.in_host_memory(updated)
        before = torch.zeros_like(in_host)
        before[: len(self._in_host)] = self._in_host
        self._in_host = in_host
        return updated[in_host & ~before]

    def _sample(self) -> Tensor:
        start = self._next_sampled
        self._next_sampled = start + SAMPLE_ROWS if start + SAMPLE_ROWS < self._shadow.num_updated else 0
        return self._shadow.updated(start, start + SAMPLE_ROWS)

    def _compare_rows(self, when: str, plan: Plan, records_OX: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        plan = plan.map(Tensor.cpu)
        # Only now is it known which steps a checkpoint had applied.
        self._updater = self._updater or copy.deepcopy(self._shard.updater)
        layout = self._shadow.layout
        truth_OX = layout.unpack(self._shadow.records(plan.rows_O).to(self._device))
        self._updater.catch_up(truth_OX)
        self._shadow.require(plan.rows_O, records_OX, truth_OX, f"{when}, brought up to date")
        for part, leaf in zip(plan.modules, leaves, strict=True):
            received = self._swap(list(leaf.detach().split(part.asked)))
            indices_O = torch.arange(len(plan.rows_O))[part.owned]
            for rank, (values, indices) in enumerate(zip(received, part.by_rank(indices_O), strict=True)):
                expected = layout.unpacked.weights(truth_OX)[indices.to(self._device)].to(self._shard.exchange_dtype)
                self._require_equal(
                    f"{when}, as rank {rank} received it", plan.rows_O[indices], values, expected.float()
                )
        return truth_OX

    def _asked_rows(self, when: str, part: ModulePlan, rows: Sequence[Tensor]) -> Tensor:
        """The rows [U] that this rank requests, from the plan's own indices: every lookup must find its row there."""
        names_U = torch.full((sum(part.asked),), -1)
        for index, lookups in zip(part.indices, rows, strict=True):
            names_U[index.index_N.long()] = lookups.flatten()
        for index, lookups in zip(part.indices, rows, strict=True):
            found = names_U[index.index_N.long()]
            if not torch.equal(found, lookups.flatten()):
                raise VerifyError(
                    f"offload.verify: {when}: the plan of rank {self._rank} looks up other rows than its token ids "
                    f"do: {_first_difference(found, lookups.flatten())}"
                )
            again = row_index(index.index_N, len(names_U))
            if not all(map(torch.equal, index.tensors, again.tensors)):
                raise VerifyError(f"offload.verify: {when}: the plan of rank {self._rank} sums in another order")
        return names_U

    def _require_equal(self, what: str, rows: Tensor, found_UD: Tensor, expected_UD: Tensor) -> None:
        differs = (found_UD != expected_UD) & ~(found_UD.isnan() & expected_UD.isnan())
        if bool(differs.any()):
            row, column = differs.nonzero()[0].tolist()
            name = self._shadow.row_name(rows[row])
            values = float(found_UD[row, column]), float(expected_UD[row, column])
            raise difference(what, name, f"column {column}", *values)

    def _swap(self, parts: list[Tensor]) -> list[Tensor]:
        """Gives `parts[r]` to rank r and returns what each rank gave, in rank order. Collective."""
        if len(parts) == 1:
            return parts
        counts = torch.tensor([len(part) for part in parts], device=self._device)
        sizes = torch.empty_like(counts)
        dist.all_to_all_single(sizes, counts, group=self._shard.group)
        sent = torch.cat(parts).to(self._device)
        received = sent.new_empty(int(sizes.sum()), *sent.shape[1:])
        dist.all_to_all_single(received, sent, sizes.tolist(), counts.tolist(), group=self._shard.group)
        home = received.to(parts[0].device)
        return list(home.split(sizes.tolist()))


def _name(step: int) -> str:
    return f"step {step + 1}"


def _first_difference(found: Tensor, expected: Tensor) -> str:
    if len(found) != len(expected):
        return f"{len(found)} instead of {len(expected)}"
    at = int((found != expected).nonzero()[0])
    return f"row {int(found[at])} instead of {int(expected[at])}"
