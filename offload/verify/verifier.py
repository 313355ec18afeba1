"""Verify mode: every step is worked out a second time, simply and one thing after another, and compared.

What is worked out again: the plan, from the token ids and one plain exchange of row ids; the rows' records as a step
gets them, from a shadow that no window, fetch or write-back ever touches; what each rank received, which is sent back
to the rows' owners; the sum of the gradients; the update; and, after each step, what host memory and the window hold.
The first difference stops the run: `VerifyError` names step, row, owner and both values.

Shape suffixes as in `offload.plan`; X words of a record with fp32 weights.
"""

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import row_index
from offload.addresses.hashing import AddressBook
from offload.plan.plan import ModulePlan, Plan, TokenBatch, digest_tokens
from offload.plan.sharding import Sharding
from offload.rows.updater import RowUpdater
from offload.verify.shadow import Shadow, VerifyError, difference
from offload.verify.store import VerifiedStore
from offload.window.interface import RowStore


class Verifier:
    """Works a step out again beside the tables. What is called collective must be called by all ranks.

    Args:
        addresses: from token ids to rows.
        sharding, rank: who owns which rows.
        shadow: of this rank's rows.
        updater: the tables' own; a copy of it, taken when the first rows are handed out, updates the shadow.
        group: the ranks, with communication on the device; None for all ranks.
        device: where the model computes: the same arithmetic gives the same bits only there.
        exchange_dtype: in which values travel from their owners.
    """

    def __init__(
        self,
        addresses: AddressBook,
        sharding: Sharding,
        rank: int,
        shadow: Shadow,
        updater: RowUpdater,
        group: dist.ProcessGroup | None,
        device: torch.device,
        exchange_dtype: torch.dtype,
    ) -> None:
        self._addresses, self._sharding, self._rank, self._shadow = addresses, sharding, rank, shadow
        self._tables_updater, self._group, self._device = updater, group, device
        self._exchange_dtype = exchange_dtype
        self._updater: RowUpdater | None = None
        self._truth_OX = torch.empty(0)
        self._gradient_OD = torch.empty(0)

    def watch(self, store: RowStore) -> RowStore:
        """The same store, with its answers compared."""
        return VerifiedStore(store, self._shadow)

    def check_plan(self, when: str, plan: Plan, batches: Sequence[TokenBatch]) -> None:
        """Compares a plan with its micro-batches, and with what the other ranks ask of this one. Collective.

        Raises:
            VerifyError: they differ.
        """
        digest = digest_tokens([tokens for tokens, _ in batches])
        if plan.digest != digest:
            raise VerifyError(f"offload.verify: {when}: the plan is of token ids {plan.digest}, not {digest}")
        rows = [self._addresses.all_rows(tokens, positions) for tokens, positions in batches]
        used = []
        for module, part in enumerate(plan.modules):
            names_U = self._asked_rows(when, part, [micro_batch[module] for micro_batch in rows])
            asked = self._swap(list(names_U.split(part.asked)))
            places = [self._sharding.to_shard(module, self._rank, ids) for ids in asked]
            planned = plan.rows_O[part.owned][part.owed_places_A].split(part.owed)
            for rank, (found, expected) in enumerate(zip(planned, places, strict=True)):
                if not torch.equal(found, expected):
                    raise VerifyError(
                        f"offload.verify: {when}: rank {self._rank} plans to send rank {rank} other rows of module "
                        f"{module} than it asks for: {_first_difference(found, expected)}"
                    )
            used += places
        if not torch.equal(torch.cat(used).unique(), plan.rows_O.sort().values):
            raise VerifyError(f"offload.verify: {when}: rank {self._rank} plans other rows than the ranks ask for")

    def check_rows(self, when: str, plan: Plan, records_OX: Tensor, leaves: Sequence[Tensor]) -> None:
        """Compares a step's rows, brought up to date, at their owners and as each rank received them. Collective.

        Raises:
            VerifyError: a row differs; raised by its owner.
        """
        self._truth_OX = self._compare_rows(when, plan, records_OX, leaves)

    def check_lookup(
        self, when: str, plan: Plan, batches: Sequence[TokenBatch], records_OX: Tensor, leaves: Sequence[Tensor]
    ) -> None:
        """Compares the plan and the rows of micro-batches that are no training step's. Collective.

        Raises:
            VerifyError: they differ.
        """
        self.check_plan(when, plan, batches)
        self._compare_rows(when, plan, records_OX, leaves)

    def check_gradients(self, when: str, plan: Plan, gradients: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        """Adds the ranks' gradients up again, in rank order, and compares. Collective.

        Args:
            when: for the message.
            plan: the step's.
            gradients: for each module, this rank's part [U, D], as it is sent.
            sums: for each module, the sums of the rows that this rank owns.

        Raises:
            VerifyError: a sum differs; raised by the row's owner.
        """
        for part, gradient, total_OD in zip(plan.modules, gradients, sums, strict=True):
            again_OD = torch.zeros_like(total_OD)
            received = self._swap(list(gradient.split(part.asked)))
            for values, places in zip(received, part.owed_places_A.to(self._device).split(part.owed), strict=True):
                again_OD[places] = again_OD[places] + values
            self._require_equal(f"{when}, its gradient", plan.rows_O[part.owned], total_OD, again_OD)
        # The tables scale theirs in place.
        self._gradient_OD = torch.cat(list(sums)).clone()

    def check_update(self, when: str, plan: Plan, records_OX: Tensor, lr: float, gradient_scale: float) -> None:
        """Applies the step to the shadow, and compares.

        Raises:
            VerifyError: a row differs.
        """
        assert self._updater is not None
        row_ids = self._sharding.global_ids(self._rank, plan.rows_O).to(self._device)
        self._updater.update(self._truth_OX, self._gradient_OD * gradient_scale, lr, row_ids)
        self._shadow.require(plan.rows_O, records_OX, self._truth_OX, f"{when}, after its update")
        self._shadow.put(plan.rows_O, self._shadow.layout.pack(self._truth_OX))

    def _compare_rows(self, when: str, plan: Plan, records_OX: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        # Only now is it known what steps a checkpoint had applied.
        self._updater = self._updater or copy.deepcopy(self._tables_updater)
        layout = self._shadow.layout
        truth_OX = layout.unpack(self._shadow.records(plan.rows_O).to(self._device))
        self._updater.catch_up(truth_OX)
        self._shadow.require(plan.rows_O, records_OX, truth_OX, f"{when}, brought up to date")
        for part, leaf in zip(plan.modules, leaves, strict=True):
            received = self._swap(list(leaf.detach().split(part.asked)))
            places_O = torch.arange(len(plan.rows_O))[part.owned]
            for rank, (values, places) in enumerate(
                zip(received, places_O[part.owed_places_A].split(part.owed), strict=True)
            ):
                expected = layout.unpacked.weights(truth_OX)[places.to(self._device)].to(self._exchange_dtype)
                self._require_equal(
                    f"{when}, as rank {rank} received it", plan.rows_O[places], values, expected.float()
                )
        return truth_OX

    def _asked_rows(self, when: str, part: ModulePlan, rows: Sequence[Tensor]) -> Tensor:
        """The rows [U] that this rank asks for, from the plan's own indices: every lookup must find its row there."""
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
            if not all(torch.equal(planned, sorted_) for planned, sorted_ in zip(index, again, strict=True)):
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
        dist.all_to_all_single(sizes, counts, group=self._group)
        sent = torch.cat(parts).to(self._device)
        received = sent.new_empty(int(sizes.sum()), *sent.shape[1:])
        dist.all_to_all_single(received, sent, sizes.tolist(), counts.tolist(), group=self._group)
        home = received.to(parts[0].device)
        return list(home.split(sizes.tolist()))


def _first_difference(found: Tensor, expected: Tensor) -> str:
    if len(found) != len(expected):
        return f"{len(found)} instead of {len(expected)}"
    at = int((found != expected).nonzero()[0])
    return f"row {int(found[at])} instead of {int(expected[at])}"
