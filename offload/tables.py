"""The tables of all Engram modules, as the trainer sees them: the life of a step.

step = tables.begin(n)  ->  forward, backward over step.batches and step.rows  ->  step.reduce()  ->  step.apply(...)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from offload.addresses.hashing import AddressBook
from offload.config import OffloadConfig
from offload.device.sender import Sender
from offload.observer import Observer
from offload.plan.finders import open_finder
from offload.plan.plan import Plan, TokenBatch, make_plan
from offload.plan.planner import Planner
from offload.plan.sharding import Sharding
from offload.plan.uploads import PlanUploads
from offload.rows.records import RecordLayout, RowInit, torch_dtype
from offload.rows.shard import Shard
from offload.rows.snapshot import Snapshot
from offload.rows.updater import RowUpdater
from offload.step import RankShard, Rows, Step
from offload.verify.verifier import Verifier
from offload.window.interface import RowStore, Traffic
from offload.window.resident import ResidentStore
from offload.window.store import WindowStore

_DECIDING_BESIDE = ("cuda",)
"""Devices beside whose loop a thread decides on coming steps: a CPU's cores have enough to do."""


_SCANNED_ROWS = 1 << 18
"""Rows whose counts are looked at together."""
_ID_BYTES = 8


class WindowTooSmall(ValueError):
    """The rows of one step alone do not fit into a window."""

    def __init__(self, step: int, rows: int, slots: int) -> None:
        super().__init__(
            f"offload.window_rows: step {step + 1} alone needs {rows:,} rows of one rank's shard at once, but the "
            f"window has {slots:,} slots; set offload.window_rows={-(-rows * 5 // 4)} or lower train.global_batch_size"
        )


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
        host_group: the same ranks, with communication in host memory, used by the planner's thread alone once
            the tables are open.
        device: where the model computes.
        tell: is told what takes long meanwhile.

    Raises:
        ValueError: if host memory does not suffice, or the device has not what the config asks for.
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
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._config, self._init = config, init
        world_size = dist.get_world_size(group) if dist.is_initialized() else 1
        rank = dist.get_rank(group) if dist.is_initialized() else 0
        self._device = torch.device(device)
        finder = open_finder(config.planner, addresses, self._device)
        sharding = Sharding(tuple(addresses.num_rows(m) for m in range(addresses.num_modules)), world_size)
        layout = RecordLayout.of(dim, config.optimizer, config.row_dtype)
        store = self._open_store(sharding, rank, layout, init, self._device, group=host_group, tell=tell)
        self._shard = RankShard(
            store,
            Sender(self._device),
            RowUpdater(config.optimizer, layout, seed=init.seed, device=self._device),
            layout,
            sharding,
            rank,
            group,
            self._device,
            torch_dtype(config.exchange_dtype),
            Observer(),
        )
        if config.verify:
            self._shard = replace(self._shard, observer=Verifier(self._shard, addresses, init))
        self._uploads = uploads = PlanUploads(self._device)
        # No reference to the tables themselves: their memory is to be free when the last one to them is gone.
        shards = sharding, rank, host_group
        self._planner = Planner(
            lambda batches: uploads.pin(make_plan(batches, finder, *shards)),
            batches,
            self._device,
            config.planner_threads,
        )
        self._num_steps = num_steps
        self._last = self._prepared = -1  # the last step that began, and the last that the store knows of
        self._step: Step | None = None
        self._told = Traffic()
        self._enter: Callable[[Literal["plan", "fetch", "exchange"]], None] = lambda stage: None

    def _open_store(
        self,
        *shard: Any,
        group: dist.ProcessGroup | None,
        tell: Callable[[str], None],
    ) -> RowStore:
        if self._config.mode == "resident":
            return ResidentStore(*shard)
        beside = self._device.type in _DECIDING_BESIDE
        return WindowStore(self._config, *shard, beside=beside, group=group, tell=tell)

    @property
    def num_parameters(self) -> int:
        """Weights of all rows of all ranks."""
        return sum(self._shard.sharding.num_rows) * self._shard.layout.dim

    @property
    def record_bytes(self) -> int:
        """Bytes of a row's record, as it is saved."""
        return self._shard.layout.bytes

    @property
    def window_bytes(self) -> int:
        """Bytes of this rank's window on the device (of the whole shard with mode=resident), padding included."""
        rows = self._shard.sharding.shard_rows(self._shard.rank)
        slots = min(self._config.window_rows, rows) if self._config.mode == "window" else rows
        return slots * self._shard.layout.stride_bytes(self._device)

    def tell_stages(self, enter: Callable[[Literal["plan", "fetch", "exchange"]], None]) -> None:
        """From now on `enter` hears what `begin` is about to wait for: a plan, rows on their way, other ranks."""
        self._enter = enter

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

    def begin(self, number: int) -> Step:
        """Begins a step: its rows have exactly the updates of the steps before it. Collective.

        Args:
            number: one more than the last step's, or the first after a resume.

        Raises:
            WindowTooSmall: on every rank, if one rank's rows do not fit into its window. The step has not begun.
            RuntimeError: if the last step is neither applied nor skipped.
        """
        if self._step is not None or (self._last >= 0 and number != self._last + 1):
            raise RuntimeError(f"step {number} began before step {self._last} was applied or skipped")
        # One plan further than rows are fetched, so that a step's plan is ready when its fetch may start.
        for ahead in range(number, min(number + self._config.depth + 2, self._num_steps)):
            self._planner.request(ahead)
        self._enter("plan")
        plan = self._require_room(number)
        self._last = number
        self._shard.observer.planned(number, plan)
        if self._prepared < number:
            self._prepare(number, plan)
        self._enter("fetch")
        places_O = self._shard.store.hold(number)
        self._look_ahead()
        self._enter("exchange")
        there = self._uploads.take(number, plan)
        self._step = Step(number, plan, there, places_O, self._shard, self._finish)
        return self._step

    def look_up(self, batches: Sequence[TokenBatch]) -> Rows:
        """The rows of any micro-batches as of now, for evaluation: no gradients, nothing moves. Collective.

        They stand in memory that the next call may overwrite.
        """
        plan = self._planner.plan_now(batches)
        there = self._uploads.now(plan)
        records_OW = self._shard.store.read(plan.rows_O)
        rows = self._shard.rows_of(there, self._shard.updater.look_at(records_OW))
        self._shard.observer.looked_up(self._last, plan, records_OW, rows.values)
        return rows

    def take_traffic(self) -> Traffic:
        """What this rank did since the last call."""
        now = replace(self._shard.store.traffic, planned_s=self._planner.busy_s)
        taken, self._told = now.since(self._told), now
        return taken

    @property
    def updates(self) -> int:
        """Updates applied so far, with those of the checkpoint that the run began with."""
        return self._shard.updater.applied

    def updated_rows(self, piece_bytes: int = 4 << 20, *, since: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's rows that were ever updated, straight from where they are: no more than a piece is copied.

        Args:
            piece_bytes: most bytes of ids and records together.
            since: rows without an update after this one are left out.

        Returns:
            Pieces, each of one module: job-wide row ids (int64 [n]) and records (fp32 [n, W]), ascending. To be taken
            before the next step.
        """
        return self._snapshot(since=since).pieces(piece_bytes)

    def update_counts(self, piece_bytes: int = 4 << 20) -> Iterator[tuple[Tensor, Tensor]]:
        """How often the rows of `updated_rows` were updated, 255 for more: the same ids in the same pieces.

        Returns:
            Pieces: job-wide row ids (int64 [n]) and counts (uint8 [n], at least 1).
        """
        shard = self._shard
        counts_R = shard.store.update_counts()
        for places in self._updated_places(piece_bytes):
            yield shard.sharding.global_ids(shard.rank, places), counts_R[places.to(counts_R.device)].cpu()

    def with_counts(
        self, rows: Iterable[tuple[Tensor, Tensor]], *, frozen: bool = False
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some of this rank's rows, with how often each was updated (uint8 [n], 255 for more).

        Args:
            rows: pieces of ids and records.
            frozen: give the counts as they are now, copied: a byte for each row of the shard. Else none may change
                while rows are taken.
        """
        counts_R = self._shard.store.update_counts()
        counts_R = counts_R.cpu().clone() if frozen else counts_R
        return self._counted(rows, counts_R)

    def _counted(
        self, rows: Iterable[tuple[Tensor, Tensor]], counts_R: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for ids, records in rows:
            places, _ = self._shard.sharding.to_places(self._shard.rank, ids)
            yield ids, records, counts_R[places.to(counts_R.device)].cpu()

    def freeze(self, *, since: int = 0, undo_bytes: int) -> Snapshot:
        """The same rows as they are now, to be read by another thread while steps go on.

        Waits until dirty slots are written to host memory. Steps after that copy the records that they are about to
        overwrite there, unless they were read already, and wait when these copies come to `undo_bytes`. There is one
        such snapshot at a time: it is to be closed before the next.
        """
        snapshot = self._snapshot(since=since, last=self.updates, undo_bytes=undo_bytes)
        self._shard.store.before_change = snapshot.preserve
        return snapshot

    def owned_rows(self) -> list[range]:
        """The job-wide ids of this rank's rows, module by module."""
        sharding, rank = self._shard.sharding, self._shard.rank
        owned = [sharding.owned(module, rank) for module in range(len(sharding.num_rows))]
        bases = [sum(sharding.num_rows[:module]) for module in range(len(sharding.num_rows))]
        return [range(base + rows.start, base + rows.stop) for base, rows in zip(bases, owned, strict=True)]

    def load_rows(self, row_ids: Tensor, records: Tensor, counts: Tensor | None = None) -> int:
        """Takes those of the given rows that this rank owns, before the first step; returns how many these are.

        Args:
            row_ids: int64 [n], job-wide.
            records: fp32 [n, W].
            counts: uint8 [n], how often each was updated; where that is not known, once for all that ever were.
        """
        shard = self._shard
        places, mine = shard.sharding.to_places(shard.rank, row_ids)
        # Never 0 where there is a version: the row would be drawn anew.
        counted = torch.ones(len(row_ids), dtype=torch.uint8) if counts is None else counts.clamp(min=1)
        counted = torch.where(shard.layout.version(records) == 0, 0, counted)
        if len(places) < len(row_ids):
            records, counted = records[mine], counted[mine]
        shard.store.load(places, records, counted)
        shard.observer.loaded(places, records)
        return len(places)

    def forget_rows(self) -> None:
        """Undoes `load_rows`: no row was ever updated."""
        for ids, records in self.updated_rows():
            records.zero_()
            self._init.fill(self._shard.layout, records, ids)
            self.load_rows(ids, records)

    def optimizer_state(self) -> dict[str, Any]:
        """What the rows' optimizer must know besides their records, JSON-able; the same on every rank."""
        return self._shard.updater.state()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Continues from `optimizer_state`, before the first step.

        Raises:
            ValueError: the state is of another optimizer.
        """
        self._shard.updater.load_state(state)

    def _snapshot(self, **options: Any) -> Snapshot:
        shard = self._shard
        records_RW = shard.store.flush()
        shard.observer.saved(records_RW)
        return Snapshot(records_RW, Shard(shard.sharding, shard.rank, shard.layout, self._init), **options)

    def _updated_places(self, piece_bytes: int) -> Iterator[Tensor]:
        """Places in the shard of the rows that were ever updated (int64), in pieces of one module."""
        sharding, rank = self._shard.sharding, self._shard.rank
        counts_R = self._shard.store.update_counts()
        most = max(1, piece_bytes // (self._shard.layout.bytes + _ID_BYTES))
        for module in range(len(sharding.num_rows)):
            start = sharding.shard_offset(module, rank)
            yield from _nonzero(counts_R, range(start, start + len(sharding.owned(module, rank))), most)

    def close(self) -> None:
        """Ends the background work."""
        self._planner.close()
        self._shard.store.close()

    def _look_ahead(self) -> None:
        for ahead in range(
            max(self._last, self._prepared) + 1, min(self._last + self._config.depth + 1, self._num_steps)
        ):
            if not self._planner.ready(ahead):
                return
            self._prepare(ahead, self._planner.plan(ahead))

    def _prepare(self, step: int, plan: Plan) -> None:
        self._prepared = step
        self._uploads.send(step, plan)
        self._shard.store.prepare(step, plan.rows_O)

    def _finish(self, updated: bool) -> None:
        number, plan = self._last, self._planner.plan(self._last)
        self._shard.store.release(number, updated=updated)
        self._shard.observer.finished(number, plan)
        self._planner.forget(number)
        self._step = None
        self._look_ahead()

    def _require_room(self, number: int) -> Plan:
        with self._shard.store.traffic.waiting():
            plan = self._planner.plan(number)
        # Judged by the fullest rank: all ranks refuse the step, and none waits for another in its exchange.
        if self._config.mode == "window" and plan.most_rows > self._config.window_rows:
            raise WindowTooSmall(number, plan.most_rows, self._config.window_rows)
        return plan


def _nonzero(counts_R: Tensor, places: range, most: int) -> Iterator[Tensor]:
    """Those of the places whose count is not 0 (int64), `most` at a time."""
    waiting = torch.empty(0, dtype=torch.int64)
    for first in range(places.start, places.stop, _SCANNED_ROWS):
        part = counts_R[first : min(first + _SCANNED_ROWS, places.stop)]
        waiting = torch.cat([waiting, part.nonzero().flatten().cpu() + first])
        whole = len(waiting) - len(waiting) % most
        yield from waiting[:whole].split(most) if whole else ()
        waiting = waiting[whole:]
    if len(waiting):
        yield waiting
