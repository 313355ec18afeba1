"""The tables of all Engram modules, as the trainer sees them: the life of a step.

step = tables.begin(n)  ->  forward, backward over step.batches and step.rows  ->  step.reduce()  ->  step.apply(...)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist

from kernels.gather.values import RowValues
from offload.addresses.hashing import AddressBook
from offload.config import OffloadConfig
from offload.opening import open_shard
from offload.owned_rows import OwnedRows
from offload.plan.finders import open_finder
from offload.plan.plan import Plan, TokenBatch, make_plan
from offload.plan.planner import Planner
from offload.plan.uploads import PlanUploads
from offload.rows.records import RowInit
from offload.step import Rows, Step
from offload.window.interface import Traffic

FIRST_DEPTH = 1
"""Look-ahead with `offload.depth=auto`, until somebody says another."""

_OF_WINDOW = {"window_rows", "engine", "programs"}


class WindowTooSmall(ValueError):
    """The rows of one step alone do not fit into a window."""

    def __init__(self, step: int, rows: int, slots: int) -> None:
        super().__init__(
            f"offload.window_rows: step {step + 1} alone needs {rows:,} rows of one rank's shard at once, but the "
            f"window has {slots:,} slots; set offload.window_rows={-(-rows * 5 // 4)} or lower train.global_batch_size"
        )


class EngramTables(OwnedRows):
    """This rank's shard of the tables, its window, and the look-ahead over coming steps.

    Between two steps it offers what `OwnedRows` does.

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
            the tables are open, but for `reopen`.
        device: where the model computes.
        tell: is told what takes long.

    Raises:
        Unavailable: if host memory does not suffice, or the device lacks what the config asks for.
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
        self._config, self._device = config, torch.device(device)
        self._depth = _depth_of(config)
        finder = open_finder(config.planner, addresses, self._device)
        shard = open_shard(
            config, addresses, dim, init, group=group, host_group=host_group, device=self._device, tell=tell
        )
        super().__init__(shard, init)
        self._uploads = uploads = PlanUploads(self._device)
        # No reference to the tables themselves: their memory is to be freed with the last one to them.
        shards = shard.sharding, shard.rank, host_group
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

    @property
    def engine(self) -> str | None:
        """What carries rows into the window and back: the engine's name, the chosen one's with `auto`; None without."""
        return self._shard.store.engine

    @property
    def window_bytes(self) -> int:
        """Bytes of this rank's window on the device (of the whole shard with mode=resident), padding included."""
        rows = self._shard.sharding.shard_rows(self._shard.rank)
        slots = min(self._config.window_rows, rows) if self._config.mode == "window" else rows
        return slots * self._shard.layout.stride_bytes(self._device)

    def tell_stages(self, enter: Callable[[Literal["plan", "fetch", "exchange"]], None]) -> None:
        """From now on `enter` is told what `begin` is about to wait for: a plan, rows on their way, other ranks."""
        self._enter = enter

    def look_ahead(self, depth: int) -> None:
        """Fetches rows up to `depth` steps before their use, from the next step on, in place of `offload.depth`.

        Steps that were already looked ahead to stay so. To be called between two steps, on all ranks alike.

        Raises:
            ValueError: the depth is negative.
        """
        if depth < 0:
            raise ValueError(f"the look-ahead is a number of steps, not {depth}")
        self._depth = depth

    def reopen(self, config: OffloadConfig) -> None:
        """Goes on with the look-ahead, the window's size, its engine and the planner's threads of `config`. Collective.

        Rows and losses stay what they are. Another size or engine empties the window. To be called between two steps.

        Raises:
            ValueError: `config` differs in something else.
            Unavailable: the device of any rank has no such engine or no room for the window; nothing has changed then,
                but that the window is empty.
        """
        free = {"depth", "planner_threads", *_OF_WINDOW}
        if config.model_dump(exclude=free) != self._config.model_dump(exclude=free):
            raise ValueError(f"between two steps only {', '.join(sorted(free))} of offload may change")
        if config.model_dump(include=_OF_WINDOW) != self._config.model_dump(include=_OF_WINDOW):
            self._planner.settle()  # a window is opened by collectives on the planner's group
            try:
                self._shard.store.reopen(config)
            finally:
                for step in range(self._last + 1, self._prepared + 1):
                    self._shard.store.prepare(step, self._planner.plan(step).rows_O)
        self._planner.take_threads(config.planner_threads)
        self._config, self._depth = config, _depth_of(config)

    def count_all_as_updated(self) -> None:
        """From now on, rows that enter the window are fetched, as late in a run, and not drawn. For measurements alone:
        the weights of rows that were never updated are zeros."""
        self._shard.store.update_counts().clamp_(min=1)

    def check_window(self, step: int, *later: int) -> None:
        """Refuses a window that the rows of `step` do not fit into, before anything was trained. Collective.

        Args:
            step: the first that is trained.
            later: others whose rows may be more.

        Raises:
            WindowTooSmall: on every rank.
        """
        self._planner.request(step)
        self._require_room(step)
        for each in later:
            self._check_room(each, self._planner.plan_once(each))

    def begin(self, number: int) -> Step:
        """Begins a step: its rows have exactly the updates of the steps before it. Collective.

        Args:
            number: one more than the last step's, or the first after a resume.

        Raises:
            WindowTooSmall: on every rank, if one rank's rows do not fit into its window. The step has not begun.
            RuntimeError: if the last step is neither applied nor skipped, or `number` does not follow it.
        """
        if self._step is not None:
            raise RuntimeError(f"step {number} began before step {self._last} was applied or skipped")
        if self._last >= 0 and number != self._last + 1:
            raise RuntimeError(f"step {number} does not follow step {self._last}, the last one")
        # One plan further than rows are fetched, so that a step's plan is ready when its fetch may start.
        for ahead in range(number, min(number + self._depth + 2, self._num_steps)):
            self._planner.request(ahead)
        self._enter("plan")
        plan = self._require_room(number)
        self._last = number
        self._shard.observer.planned(number, plan)
        if self._prepared < number:
            self._prepare(number, plan)
        self._enter("fetch")
        slots_O = self._shard.store.hold(number)
        self._look_ahead()
        self._enter("exchange")
        there = self._uploads.take(number, plan)
        self._step = Step(number, plan, there, slots_O, self._shard, self._finish)
        return self._step

    def look_up(self, batches: Sequence[TokenBatch]) -> Rows:
        """The rows of any micro-batches as of now, for evaluation: no gradients, nothing moves. Collective.

        They are in memory that the next call may overwrite.
        """
        plan = self._planner.plan_now(batches)
        there = self._uploads.now(plan)
        records_OW = self._shard.store.read(plan.rows_O)
        rows = self._shard.rows_of(there, RowValues(self._shard.updater.look_at(records_OW).tensor()))
        self._shard.observer.looked_up(self._last, plan, records_OW, rows)
        return rows

    @property
    def traffic(self) -> Traffic:
        """What this rank did so far."""
        return replace(self._shard.store.traffic, planned_s=self._planner.busy_s)

    def take_traffic(self) -> Traffic:
        """What this rank did since the last call."""
        now = self.traffic
        taken, self._told = now.since(self._told), now
        return taken

    def close(self) -> None:
        """Ends the background work."""
        self._planner.close()
        self._shard.store.close()

    def _look_ahead(self) -> None:
        for ahead in range(max(self._last, self._prepared) + 1, min(self._last + self._depth + 1, self._num_steps)):
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
        self._check_room(number, plan)
        return plan

    def _check_room(self, number: int, plan: Plan) -> None:
        # Judged by the fullest rank: all ranks refuse the step, and none waits for another in its exchange.
        if self._config.mode == "window" and plan.most_rows > self._config.window_rows:
            raise WindowTooSmall(number, plan.most_rows, self._config.window_rows)


def _depth_of(config: OffloadConfig) -> int:
    return FIRST_DEPTH if config.depth == "auto" else config.depth
