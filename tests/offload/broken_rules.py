"""The rules of the tables, each broken on purpose: context managers around a hazard job, which must be caught."""

import random
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from offload import gradients as gradients_module
from offload import opening
from offload.config import TableOptimizerConfig
from offload.gradients import ModuleGradient
from offload.plan.plan import ModulePlan
from offload.rows.records import RecordLayout
from offload.rows.shard import Shard
from offload.rows.updater import RowUpdater
from offload.step import Step
from offload.transfers.copies import WorkerCopy
from offload.transfers.open import CpuTransfers
from offload.window.admissions import Admissions
from offload.window.directory import NEVER, SlotState
from offload.window.open import open_directory
from offload.window.store import WindowStore
from offload.window.update_counts import UpdateCounts

Directory = type(open_directory(1, 1))
"""The one that windows have here."""

Broken = AbstractContextManager[object]
Rule = Callable[[], Broken]


def fetch_from_a_row_in_write_back() -> Broken:
    """A row is in host memory as soon as its write-back starts: its fetch does not wait for it to land."""

    def evict(call: Callable[..., np.ndarray], self: Directory, count: int) -> np.ndarray:
        slots = call(self, count)
        self._slot_of[self.rows(slots)] = NEVER
        return slots

    def written(call: Callable[..., None], self: Directory, slots: np.ndarray) -> None:
        rows = self.rows(slots)
        now = self.slots(rows)
        call(self, slots)
        self._slot_of[rows[now != slots]] = now[now != slots]

    both = ExitStack()
    both.enter_context(_wrapped(Directory, "evict", evict))
    both.enter_context(_wrapped(Directory, "written", written))
    return both


def slot_reused_before_its_write_back_landed() -> Broken:
    """Write-backs report to have landed when they start."""
    return _wrapped(CpuTransfers, "write_back", _landed_at_once)


def fetch_not_waited_for() -> Broken:
    """Fetches report to have landed when they start."""
    return _wrapped(CpuTransfers, "fetch", _landed_at_once)


def write_back_not_waited_for() -> Broken:
    """A row taken back is handed out for its update while it is still being copied to host memory."""

    def settle(call: Callable[..., None], self: Admissions, admitted: Any) -> None:
        with mock.patch.object(self._directory, "being_written", return_value=False):
            call(self, admitted)

    return _wrapped(Admissions, "settle", settle)


def resurrection_dropped() -> Broken:
    """A row taken back while it is being copied still leaves when the copy has landed."""

    def admit(call: Callable[..., Any], self: Directory, step: int, rows: np.ndarray) -> Any:
        leaving = np.flatnonzero(self.state == SlotState.WRITEBACK)
        admission = call(self, step, rows)
        self.state[leaving] = SlotState.WRITEBACK
        return admission

    return _wrapped(Directory, "admit", admit)


def needed_rows_evicted() -> Broken:
    """Coming steps hold nothing: rows leave by their last finished use alone."""
    return mock.patch.object(Directory, "keep", return_value=None)


def dirt_forgotten() -> Broken:
    """Updated rows leave the window as if host memory had them."""

    def finish(call: Callable[..., None], self: Directory, step: int, updated: np.ndarray) -> None:
        call(self, step, updated)
        self.dirty[updated] = False

    return _wrapped(Directory, "finish", finish)


def initial_values_not_drawn() -> Broken:
    """A fetch brings what host memory holds, also for rows that were never updated."""
    return _wrapped(Shard, "initial", lambda call, self, device: call(self, device) | {"std": 0.0})


def updates_not_counted() -> Broken:
    """Rows are drawn anew when they come back, as if they had never been updated."""
    return mock.patch.object(UpdateCounts, "add")


def stale_look_up() -> Broken:
    """An evaluation reads host memory, whoever is the authority."""

    def read(call: Callable[..., Tensor], self: WindowStore, rows: Tensor) -> Tensor:
        with mock.patch.object(self._directory, "slots", lambda rows: np.full(len(rows), NEVER)):
            return call(self, rows)

    return _wrapped(WindowStore, "read", read)


def saved_without_the_window() -> Broken:
    """A save writes what host memory holds."""
    return mock.patch.object(WindowStore, "flush", lambda self: self._host.records_RW)


def applied_twice() -> Broken:
    """A step is applied two times."""

    def apply(call: Callable[..., None], self: RowUpdater, *args: Any, **keywords: Any) -> None:
        call(self, *args, **keywords)
        call(self, *args, **keywords)

    return _wrapped(RowUpdater, "update_at", apply)


def skipped_step_applied() -> Broken:
    """A step whose gradients were reduced is applied, though it was skipped."""

    def skip(call: Callable[..., None], self: Step) -> None:
        try:
            self.apply(lr=0.01)
        except RuntimeError:  # there are no gradients
            call(self)

    return _wrapped(Step, "skip", skip)


def skipped_step_counted() -> Broken:
    """A skipped step counts as one that rows have missed."""

    def skip(call: Callable[..., None], self: Step) -> None:
        updater = self._shard.updater
        state = updater.state()
        updater.load_state(state | {"learning_rates": [*state["learning_rates"], 0.0]})
        call(self)

    return _wrapped(Step, "skip", skip)


def replay_skipped() -> Broken:
    """Rows are used without the steps that they missed."""

    def updater(config: TableOptimizerConfig, layout: RecordLayout, **keywords: Any) -> RowUpdater:
        return RowUpdater(config.model_copy(update={"untouched_rows": "lazy"}), layout, **keywords)

    return mock.patch.object(opening, "RowUpdater", updater)


def replay_at_the_latest_rate() -> Broken:
    """Missed steps are replayed with the learning rate of today."""

    def update_at(call: Callable[..., None], self: RowUpdater, *args: Any, **keywords: Any) -> None:
        call(self, *args, **keywords)
        state = self.state()
        rates = state["learning_rates"]
        self.load_state(state | {"learning_rates": rates[-1:] * len(rates)})

    return _wrapped(RowUpdater, "update_at", update_at)


def first_micro_batch_forgotten() -> Broken:
    """Each micro-batch's gradient replaces that of the one before."""

    def add(call: Callable[..., None], self: ModuleGradient, *args: Any) -> None:
        self._total_UD = None
        call(self, *args)

    return _wrapped(ModuleGradient, "_add", add)


def summed_in_order_of_arrival() -> Broken:
    """Gradients are added as they come, not in rank order."""
    arrivals = random.Random(0)

    def add(total_OD: Tensor, parts: list[tuple[Tensor, Tensor]]) -> None:
        for places, values in arrivals.sample(parts, len(parts)):
            total_OD.index_add_(0, places, values)

    return _exchanged(add)


def last_rank_wins() -> Broken:
    """A row gets the gradient of one rank alone, as in tables that all ranks write to."""

    def put(total_OD: Tensor, parts: list[tuple[Tensor, Tensor]]) -> None:
        for places, values in parts:
            total_OD.index_copy_(0, places, values)

    return _exchanged(put)


def _exchanged(add: Callable[[Tensor, list[tuple[Tensor, Tensor]]], None]) -> Broken:
    def exchange(plan: ModulePlan, gradient_UD: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
        received_AD = gradient_UD.new_empty(sum(plan.owed), gradient_UD.shape[1])
        dist.all_to_all_single(received_AD, gradient_UD, plan.owed, plan.asked, group=group)
        total_OD = gradient_UD.new_zeros(len(plan.owed_starts_O), gradient_UD.shape[1])
        places = plan.by_rank(torch.arange(len(total_OD)))
        add(total_OD, list(zip(places, received_AD.split(plan.owed), strict=True)))
        return lambda: total_OD

    return mock.patch.object(gradients_module, "exchange_gradients", exchange)


def _landed_at_once(call: Callable[..., WorkerCopy], self: CpuTransfers, *args: Any) -> WorkerCopy:
    call(self, *args)
    landed: Future[None] = Future()
    landed.set_result(None)
    return WorkerCopy(landed)


def _wrapped(owner: type, name: str, wrapper: Callable[..., Any]) -> Broken:
    """Replaces a method; `wrapper` gets what it replaces, the object and the arguments."""
    call = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **keywords: wrapper(call, *args, **keywords))
