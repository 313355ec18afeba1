"""The tables of all Engram modules, as the trainer sees them: the life of a step.

begin(step)  ->  rows as autograd leaves  ->  forward, backward  ->  reduce_gradients()  ->  apply(...) or skip()
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import RowIndex
from offload.addresses.hashing import AddressBook
from offload.config import OffloadConfig
from offload.device.sent import Sender
from offload.plan.exchange import exchange_gradients, exchange_values
from offload.plan.plan import Plan, TokenBatch, digest_tokens, make_plan
from offload.plan.planner import Planner
from offload.plan.sharding import Sharding
from offload.plan.uploads import PlanUploads
from offload.rows.records import RecordLayout, RowInit, torch_dtype
from offload.rows.updater import RowUpdater
from offload.verify.shadow import Shadow
from offload.verify.verifier import Verifier
from offload.window.background import BackgroundStore
from offload.window.interface import RowStore, Traffic
from offload.window.resident import ResidentStore
from offload.window.store import WindowStore

_DECIDING_BESIDE = ("cuda",)
"""Devices beside whose loop a thread decides on coming steps: a CPU's cores have enough to do."""


class WindowTooSmall(ValueError):
    """The rows of one step alone do not fit into a window."""

    def __init__(self, step: int, rows: int, slots: int) -> None:
        super().__init__(
            f"offload.window_rows: step {step + 1} alone needs {rows:,} rows of one rank's shard at once, but the "
            f"window has {slots:,} slots; set offload.window_rows={-(-rows * 5 // 4)} or lower train.global_batch_size"
        )


@dataclass(frozen=True)
class StepRows:
    """The rows of a step's tokens.

    Attributes:
        leaves: for each Engram module, this rank's unique rows: fp32 [U, D], an autograd leaf.
        indices: for each micro-batch and module, the place of every lookup among those rows.
    """

    leaves: list[Tensor]
    indices: list[list[RowIndex]]


class EngramTables:
    """This rank's shard of the tables, its window, and the look-ahead over coming steps.

    Every method that is called collective must be called by all ranks of `group` in the same order.

    Args:
        config: the `offload` section.
        addresses: from token ids to rows.
        dim: columns of a row (D).
        init: the rows' values before their first update.
        batches: this rank's micro-batches of a step, a pure function of the step number.
        num_steps: no step at or after this one is looked ahead to.
        group: the ranks, with communication on the device; None for all ranks.
        host_group: the same ranks, with communication in host memory, used by the planner's thread alone.
        device: where the model computes.

    Raises:
        ValueError: if host memory does not suffice.
    """

    def __init__(
        self,
        config: OffloadConfig,
        addresses: AddressBook,
        *,
        dim: int,
        init: RowInit,
        batches: Callable[[int], Sequence[TokenBatch]],
        num_steps: int,
        group: dist.ProcessGroup | None = None,
        host_group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._config = config
        self._world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        self._rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.sharding = Sharding(tuple(addresses.num_rows(m) for m in range(addresses.num_modules)), self._world_size)
        self.layout = RecordLayout.of(dim, config.optimizer, config.row_dtype)
        self.device = torch.device(device)
        self.updater = RowUpdater(config.optimizer, self.layout, seed=init.seed, device=self.device)
        shard = (self.sharding, self._rank, self.layout, init, self.device)
        self._store = self._open_store(*shard)
        self._verifier: Verifier | None = None
        if config.verify:
            shadow = Shadow(self.layout, init, self.sharding, self._rank)
            dtype = torch_dtype(config.exchange_dtype)
            self._verifier = Verifier(
                addresses, self.sharding, self._rank, shadow, self.updater, group, self.device, dtype
            )
            self._store = self._verifier.watch(self._store)
        self._uploads, self._sender = uploads, _ = PlanUploads(self.device), Sender(self.device)
        # No reference to the tables themselves: their memory is to be free when the last one to them is gone.
        shards = self.sharding, self._rank, host_group
        self._planner = Planner(
            lambda batches: uploads.pin(make_plan(batches, addresses, *shards)),
            batches,
            self.device,
            config.planner_threads,
        )
        self._group, self._num_steps = group, num_steps
        self._batches = batches
        self._step = -1
        self._rows: StepRows | None = None
        self._plan: Plan | None = None  # the step's, on the device
        self._places_O = torch.empty(0, dtype=torch.int64)
        self._gradient_OD: Tensor | None = None

    def _open_store(self, *shard: Any) -> RowStore:
        if self._config.mode == "resident":
            return ResidentStore(*shard)
        beside = self.device.type in _DECIDING_BESIDE and not self._config.verify
        window = WindowStore(self._config, *shard, may_wait=beside)
        return BackgroundStore(window) if beside else window

    @property
    def window_bytes(self) -> int:
        """Bytes of this rank's window on the device (of the whole shard with mode=resident), padding included."""
        rows = self.sharding.shard_rows(self._rank)
        slots = min(self._config.window_rows, rows) if self._config.mode == "window" else rows
        return slots * self.layout.stride_bytes(self.device)

    def look_ahead(self, depth: int) -> None:
        """Fetches rows up to `depth` steps before their use, from the next step on, in the place of `offload.depth`.

        Steps that were looked ahead to stay so. To be called between two steps, on all ranks alike.

        Raises:
            ValueError: the depth is negative.
        """
        if depth < 0:
            raise ValueError(f"the look-ahead is a number of steps, not {depth}")
        self._config = self._config.model_copy(update={"depth": depth})

    def check_window(self, step: int) -> None:
        """Refuses a window that the rows of `step` do not fit into, before anything was trained. Collective.

        Raises:
            WindowTooSmall: on every rank.
        """
        self._planner.request(step)
        self._require_room(step)

    def begin(self, step: int, tokens: Sequence[Tensor]) -> StepRows:
        """Hands out the rows of `step`, with exactly the updates of the steps before it. Collective.

        The leaves stand in memory that the next step's may overwrite.

        Args:
            step: one more than the last, or the first after a resume.
            tokens: int64 [B, T] of each micro-batch: what is about to be trained on.

        Raises:
            WindowTooSmall: on every rank, if one rank's rows do not fit into its window. The step has not begun.
            RuntimeError: if the last step is neither applied nor skipped, or the tokens are not the planned ones.
        """
        if self._rows is not None or (self._step >= 0 and step != self._step + 1):
            raise RuntimeError(f"step {step} began before step {self._step} was applied or skipped")
        # One plan further than rows are fetched, so that a step's plan is ready when its fetch may start.
        for ahead in range(step, min(step + self._config.depth + 2, self._num_steps)):
            self._planner.request(ahead)
        plan = self._require_room(step)
        if plan.digest != digest_tokens(tokens):
            raise RuntimeError(f"the tokens of step {step} are not those that its rows were planned for")
        self._step = step
        if self._verifier:
            self._verifier.check_plan(f"step {step + 1}", plan, self._batches(step))
        self._places_O = self._store.acquire(step, plan.rows_O)
        self._prefetch()
        self._plan = self._uploads.take(step, plan)
        weights_OD = self.updater.read(self._store.records, self._places_O)
        leaves = [leaf.requires_grad_() for leaf in self._exchange(self._plan, weights_OD)]
        if self._verifier:
            self._verifier.check_rows(f"step {step + 1}", plan, self._caught_up(self._stored()), leaves)
        self._rows = StepRows(leaves, self._indices(self._plan))
        return self._rows

    def reduce_gradients(self) -> Tensor:
        """Sends the leaves' gradients to the rows' owners. Collective.

        Returns:
            fp64 scalar: the squared norm of the gradient of all rows, averaged over ranks; the same on every rank.
        """
        if self._rows is None or self._plan is None:
            raise RuntimeError("no step has begun")
        gradients = [_gradient(leaf) for leaf in self._rows.leaves]
        parts = [
            exchange_gradients(part, gradient, part.owned.stop - part.owned.start, self._group)
            for part, gradient in zip(self._plan.modules, gradients, strict=True)
        ]
        if self._verifier:
            plan = self._planner.plan(self._step)
            self._verifier.check_gradients(f"step {self._step + 1}", plan, gradients, parts)
        self._gradient_OD = parts[0] if len(parts) == 1 else torch.cat(parts)
        norm_squared = torch.linalg.vecdot(self._gradient_OD, self._gradient_OD).sum(dtype=torch.float64)
        if self._world_size > 1:
            dist.all_reduce(norm_squared, group=self._group)
        return norm_squared / self._world_size**2

    def apply(self, *, lr: float, gradient_scale: float = 1.0) -> None:
        """Updates each row of the step once, at its owner.

        Args:
            lr: the backbone's learning rate of this step; the rows' factor is applied here.
            gradient_scale: multiplied with the gradient first (clipping).
        """
        if self._gradient_OD is None:
            raise RuntimeError("gradients were not reduced")
        scale = gradient_scale / self._world_size
        plan = self._planner.plan(self._step)
        # They key the rounding of bf16 rows.
        row_ids = None
        if self._config.row_dtype == "bf16":
            (row_ids,) = self._sender.send(self.sharding.global_ids(self._rank, plan.rows_O)).take()
        self.updater.update_at(
            self._store.records,
            self._places_O,
            self._gradient_OD,
            lr,
            row_ids,
            gradient_scale=scale,
        )
        if self._verifier:
            self._verifier.check_update(f"step {self._step + 1}", plan, self.layout.unpack(self._stored()), lr, scale)
        self._finish(updated=True)

    def skip(self) -> None:
        """Ends the step without a trace in any row."""
        self._finish(updated=False)

    def look_up(self, batches: Sequence[TokenBatch]) -> StepRows:
        """The rows of any micro-batches as of now, for evaluation: no gradients, nothing moves. Collective.

        They stand in memory that the next call may overwrite.
        """
        plan = self._planner.plan_now(batches)
        records_OW = self._store.read(plan.rows_O)
        leaves = self._exchange(plan, self.updater.look_at(records_OW))
        if self._verifier:
            when = f"evaluation after step {self._step + 1}"
            self._verifier.check_lookup(when, plan, batches, self._caught_up(records_OW), leaves)
        return StepRows(leaves, self._indices(plan))

    def take_traffic(self) -> Traffic:
        """What this rank did since the last call."""
        return replace(self._store.take_traffic(), planned_s=self._planner.take_busy_s())

    def updated_rows(self, chunk_rows: int = 1 << 18) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows that were ever updated: (job-wide row ids int64 [n], records fp32 [n, W]), ascending."""
        records_RW = self._store.flush()
        for start in range(0, len(records_RW), chunk_rows):
            chunk = records_RW[start : start + chunk_rows]
            touched = self.layout.version(chunk).nonzero().flatten()
            if len(touched):
                ids = self.sharding.global_ids(self._rank, touched.cpu() + start)
                yield ids, chunk[touched].cpu()

    def load_rows(self, row_ids: Tensor, records: Tensor) -> None:
        """Takes those of the given rows that this rank owns, before the first step.

        Args:
            row_ids: int64 [n], job-wide.
            records: fp32 [n, W].
        """
        places, mine = self.sharding.to_places(self._rank, row_ids)
        self._store.load(places, records[mine])

    def close(self) -> None:
        """Ends the background work."""
        self._planner.close()
        self._store.close()

    def _prefetch(self) -> None:
        for ahead in range(self._step + 1, min(self._step + self._config.depth + 1, self._num_steps)):
            if not self._planner.ready(ahead):
                return
            plan = self._planner.plan(ahead)
            self._uploads.send(ahead, plan)
            if not self._store.prefetch(ahead, plan.rows_O):
                return

    def _stored(self) -> Tensor:
        """A copy of the step's records as they stand in the store."""
        return self._store.records.index_select(0, self._places_O)

    def _caught_up(self, records_OW: Tensor) -> Tensor:
        records_OX = self.layout.unpack(records_OW)
        self.updater.catch_up(records_OX)
        return records_OX

    def _exchange(self, plan: Plan, weights_OD: Tensor) -> list[Tensor]:
        dtype = torch_dtype(self._config.exchange_dtype)
        return [exchange_values(part, weights_OD[part.owned], self._group, dtype) for part in plan.modules]

    def _indices(self, plan: Plan) -> list[list[RowIndex]]:
        to_device = [[index.to(self.device) for index in part.indices] for part in plan.modules]
        return [list(modules) for modules in zip(*to_device, strict=True)]

    def _finish(self, *, updated: bool) -> None:
        self._store.finish(self._step, self._planner.plan(self._step).rows_O, updated=updated)
        self._planner.forget(self._step)
        self._rows = self._plan = self._gradient_OD = None
        self._prefetch()

    def _require_room(self, step: int) -> Plan:
        with self._store.traffic.waiting():
            plan = self._planner.plan(step)
        # Judged by the fullest rank: all ranks refuse the step, and none waits for another in its exchange.
        if self._config.mode == "window" and plan.most_rows > self._config.window_rows:
            raise WindowTooSmall(step, plan.most_rows, self._config.window_rows)
        return plan


def _gradient(leaf: Tensor) -> Tensor:
    return leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
