"""Ways to break the tables from outside, for tests of verify mode: each is a context manager around one step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from kernels.gather import RowIndex
from kernels.gather.values import RowValues
from offload import gradients as gradients_module
from offload import step as step_module
from offload.plan.plan import ModulePlan, Plan
from offload.rows.updater import ReadRows
from offload.tables import EngramTables
from offload.window.open import open_directory
from offload.window.store import WindowStore

Directory = type(open_directory(1, 1))
"""The one that windows have here."""

Breakage = Callable[[EngramTables, int], AbstractContextManager[object]]
"""Called with the tables and the step that is about to begin."""


def window_of(tables: EngramTables) -> WindowStore:
    """The window that trains, and that verify mode watches."""
    store: Any = tables._shard.store
    return store


@contextmanager
def flipped_slot(tables: EngramTables, step: int) -> Iterator[None]:
    """A bit of a resident row that the step uses."""
    slots = window_of(tables)._directory.slots(tables._planner.plan(step).rows_O.numpy())
    _flip(window_of(tables).records[int(slots[slots >= 0][0])])
    yield


@contextmanager
def flipped_host(tables: EngramTables, step: int) -> Iterator[None]:
    """A bit of an updated row in host memory."""
    _flip(window_of(tables)._host.records_RW[_settled(tables)])
    yield


@contextmanager
def aged_host(tables: EngramTables, step: int) -> Iterator[None]:
    """The version of an updated row in host memory, as if an update had been lost."""
    window_of(tables)._host.records_RW[_settled(tables)].view(torch.int32)[-1] -= 1
    yield


@contextmanager
def written_elsewhere(tables: EngramTables, step: int) -> Iterator[None]:
    """A record in a row of host memory that no step ever used; the rows are saved next."""
    host_RW = window_of(tables)._host.records_RW
    versions = host_RW.view(torch.int32)[:, -1]
    host_RW[int((versions == 0).nonzero()[0])] = host_RW[int(versions.nonzero()[0])]
    list(tables.updated_rows())
    yield


def lost_write_back(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """Write-backs that report to have landed and have not."""
    return mock.patch.object(window_of(tables)._transfers, "_write_back", return_value=None)


def forgotten_dirt(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """Updated rows that leave the window as if host memory had them."""

    def finish(self: Directory, step: int, updated: np.ndarray) -> None:
        finish_(self, step, updated)
        self.dirty[updated] = False

    finish_ = Directory.finish
    return mock.patch.object(Directory, "finish", finish)


def other_values(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """Rows that arrive changed."""
    return _changed(step_module, "exchange_values", lambda rows: RowValues(rows.tensor() + 1))


def other_gradients(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """A gradient of which a rank's part got lost."""
    return _changed(gradients_module, "exchange_gradients", lambda arriving: lambda: arriving() / 2)


def updated_twice(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """A step that is applied two times."""
    update = tables._shard.updater.update_at

    def twice(*args: Any, **keywords: Any) -> None:
        update(*args, **keywords)
        update(*args, **keywords)

    return mock.patch.object(tables._shard.updater, "update_at", twice)


def not_caught_up(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """Rows used without the steps that they missed."""
    read = tables._shard.updater.read

    def as_stored(records: Tensor, slots: Tensor) -> ReadRows:
        return replace(read(records, slots), weights=RowValues(tables._shard.layout.weights(records)[slots].float()))

    return mock.patch.multiple(tables._shard.updater, read=as_stored, catch_up=lambda records: None)


def other_rows(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """A plan whose lookups find other rows."""
    return _replanned(
        tables, step, lambda part: _with_indices(part, lambda i: i._replace(segment_N=i.segment_N.roll(1)))
    )


def other_order(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """A plan that sums lookups in another order."""
    return _replanned(tables, step, lambda part: _with_indices(part, lambda i: i._replace(order_N=i.order_N.flip(0))))


def other_owned(tables: EngramTables, step: int) -> AbstractContextManager[object]:
    """A plan that sends other rows than were asked for."""
    return _planned(tables, step, lambda plan: replace(plan, rows_O=plan.rows_O.roll(1)))


def _flip(record_W: Tensor) -> None:
    record_W.view(torch.int32)[0] ^= 1 << 12


def _settled(tables: EngramTables) -> int:
    """An updated row whose authority is host memory, and which no step that is being looked ahead to will fetch."""
    window = window_of(tables)
    updated = window._host.records_RW.view(torch.int32)[:, -1].nonzero().flatten()
    return int(updated[window.in_host_memory(updated)][0])


def _changed(owner: Any, name: str, change: Callable[[Any], Any]) -> AbstractContextManager[object]:
    call = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **keywords: change(call(*args, **keywords)))


def _with_indices(part: ModulePlan, change: Callable[[RowIndex], RowIndex]) -> ModulePlan:
    return replace(part, indices=tuple(change(index) for index in part.indices))


def _replanned(
    tables: EngramTables, step: int, change: Callable[[ModulePlan], ModulePlan]
) -> AbstractContextManager[object]:
    return _planned(tables, step, lambda plan: replace(plan, modules=tuple(map(change, plan.modules))))


def _planned(tables: EngramTables, step: int, change: Callable[[Plan], Plan]) -> AbstractContextManager[object]:
    plan_of = tables._planner.plan

    def plan(wanted: int) -> Plan:
        plan = plan_of(wanted)
        return change(plan) if wanted == step else plan

    return mock.patch.object(tables._planner, "plan", plan)
