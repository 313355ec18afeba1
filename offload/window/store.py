"""A shard in host memory, seen through a window of slots on the device."""

import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from offload.config import OffloadConfig
from offload.device.workers import InlineWorker, background_worker
from offload.errors import Unavailable
from offload.host.file_records import FileRecords
from offload.host.memory import zeros_on
from offload.host.table import FileTable, HostTable
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.rows.shard import Shard
from offload.transfers.agreement import Ranks
from offload.transfers.open import open_transfers, pins
from offload.window.admissions import Admissions
from offload.window.interface import Traffic
from offload.window.open import open_directory
from offload.window.update_counts import UpdateCounts

P = ParamSpec("P")


class WindowStore:
    """A shard in host memory, and a window of slots that holds the rows of the steps at hand.

    `Admissions` decide which rows have slots: in the loop, or on a thread while the loop gives the device its work. The
    loop touches nothing of theirs but the step that it holds, or else first waits until everything is decided.

    Args:
        config: offload settings.
        sharding, rank: which rows the shard holds.
        layout, init: of the records.
        device: of the window.
        beside: whether a thread decides. Copies that it requests are ordered after what the device's default stream was
            given by then, which is at least what it was given when the loop asked.
        group: the ranks, with communication in host memory, which agree on an engine; None for all.
        tell: is told what takes long.

    Raises:
        Unavailable: if host memory does not suffice, or the device has no such engine or no room for the window.
    """

    def __init__(
        self,
        config: OffloadConfig,
        sharding: Sharding,
        rank: int,
        layout: RecordLayout,
        init: RowInit,
        device: torch.device,
        *,
        beside: bool = False,
        group: dist.ProcessGroup | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        num_rows = sharding.shard_rows(rank)
        self._host = _open_host(config, num_rows, layout, device)
        self._counts = UpdateCounts(num_rows, device)
        self._shard = Shard(sharding, rank, layout, init)
        self._device, self._beside = device, beside
        self._ranks = Ranks(sharding.world_size, group)
        self.traffic = Traffic()
        self._decider = background_worker("engram-window", device) if beside else InlineWorker()
        self._prepared: dict[int, Future[None]] = {}
        self._asked: deque[Future[None]] = deque()
        try:
            self._open_window(config, tell)
        except BaseException:
            self._decider.shutdown()
            self._host.close()
            raise

    @property
    def engine(self) -> str:
        """See `RowStore.engine`."""
        return self._transfers.name

    @property
    def before_change(self) -> Callable[[Tensor], object]:
        """See `RowStore.before_change`."""
        return self._admissions.before_change

    @before_change.setter
    def before_change(self, tell: Callable[[Tensor], object]) -> None:
        self._admissions.before_change = tell

    def prepare(self, step: int, rows: Tensor) -> None:
        """See `RowStore.prepare`."""
        self._prepared[step] = self._ask(self._admissions.prepare, step, rows.numpy())

    def hold(self, step: int) -> Tensor:
        """See `RowStore.hold`. The caller has made sure that the rows fit into the window.

        Raises:
            RuntimeError: they do not, or an earlier step is not released.
        """
        self._await(self._prepared.pop(step))
        if step not in self._admissions.admitted:
            # There was no room. Now the earlier steps are released, or will be when it is this one's turn.
            self._await(self._ask(self._admissions.admit_waiting, step))
        if step not in self._admissions.admitted:
            raise RuntimeError(f"no slot can become free for step {step}, with no write-back under way")
        admitted = self._admissions.admitted[step]
        if not self._beside:
            self._admissions.settle(admitted)
        with self.traffic.waiting():
            admitted.fetch.order()
        if admitted.after is not None:
            admitted.after.order()
        self._ask(self._admissions.land, admitted)
        # Counted for the step that uses the rows, not for the earlier one during which they travelled.
        self.traffic.requested += len(admitted.used)
        self.traffic.fetched += admitted.stored
        self.traffic.drawn += len(admitted.fetched) - admitted.stored
        (slots_O,) = admitted.slots.take()
        return slots_O

    def release(self, step: int, *, updated: bool) -> None:
        """See `RowStore.release`."""
        self._ask(self._admissions.release, step, updated)

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        self._await_all()
        self._admissions.writebacks.land()
        records = self._host.records_RW.index_select(0, rows)
        self._shard.fill(records, rows)
        records = records.to(self.records.device)
        slots = self._directory.slots(rows.numpy())
        held = np.flatnonzero(slots >= 0)
        # Rows on their way in are equal in host memory and slot, but may not have landed in the slot yet.
        held = held[~np.isin(slots[held], self._admissions.slots_in_flight())]
        if len(held):
            held_H, slots_H = (torch.from_numpy(part).to(self.records.device) for part in (held, slots[held]))
            records.index_copy_(0, held_H, self.records.index_select(0, slots_H))
        return records

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """See `RowStore.in_host_memory`."""
        self._await_all()
        return torch.from_numpy(self._directory.slots(rows.numpy()) < 0)

    def flush(self) -> Tensor | FileRecords:
        """See `RowStore.flush`."""
        self._await_all()
        self._admissions.write_all_back()
        return self._host.records_RW

    def update_counts(self) -> Tensor:
        """See `RowStore.update_counts`."""
        self._await_all()
        return self._counts.counts_R

    def load(self, rows: Tensor, records_UW: Tensor, counts_U: Tensor) -> None:
        """See `RowStore.load`."""
        self._await_all()
        self._host.records_RW[rows] = records_UW
        self._counts.counts_R[rows] = counts_U

    def reopen(self, config: OffloadConfig) -> None:
        """Goes on with another window: `window_rows` slots, carried by the engine of `config`. Collective.

        All records go back to host memory first. What was prepared is forgotten, and has to be prepared again.

        Raises:
            Unavailable: the device has no such engine or no room, on any rank. The window is then as before, and empty.
        """
        self.flush()
        for admitted in self._admissions.admitted.values():
            admitted.fetch.wait()
        self._prepared.clear()
        self._transfers.close()
        before_change, before = self.before_change, self._config
        del self._admissions, self._transfers, self._directory, self.records  # room for the next window
        try:
            self._open_window(config)
        except Unavailable as error:
            traceback.clear_frames(error.__traceback__)  # room for the window before
            self._open_window(before)
            raise
        finally:
            self.before_change = before_change

    def close(self) -> None:
        """See `RowStore.close`."""
        self._decider.shutdown()
        self._transfers.close()
        self._host.close()

    def _open_window(self, config: OffloadConfig, tell: Callable[[str], None] = lambda text: None) -> None:
        layout, num_rows = self._shard.layout, len(self._host.records_RW)
        num_slots = min(config.window_rows, num_rows)
        records = self._ranks.agreed(
            lambda: zeros_on(self._device, num_slots, layout.stride(self._device))[:, : layout.words],
            Unavailable(f"another rank has no room for a window of {num_slots:,} slots: lower offload.window_rows"),
        )
        self._transfers = open_transfers(config, self._host, records, self._shard, self._ranks, tell=tell)
        self._config, self.records = config, records
        self._directory = open_directory(num_rows, num_slots)
        self._admissions = Admissions(
            self._directory, self._counts, self._transfers, self._device, self.traffic, beside=self._beside
        )

    def _ask(self, decide: Callable[P, None], /, *args: P.args, **keywords: P.kwargs) -> Future[None]:
        """Has something decided after everything that was asked before; raises what went wrong with that."""
        while self._asked and self._asked[0].done():
            self._asked.popleft().result()
        self._asked.append(asked := self._decider.submit(decide, *args, **keywords))
        return asked

    def _await(self, asked: Future[None]) -> None:
        with self.traffic.waiting():
            asked.result()

    def _await_all(self) -> None:
        """Waits until nobody is at work on the window."""
        while self._asked:
            self._await(self._asked.popleft())


def _open_host(
    config: OffloadConfig, num_rows: int, layout: RecordLayout, device: torch.device
) -> HostTable | FileTable:
    beside = num_rows  # one byte per row for the counts
    if config.host_file is not None:
        return FileTable(num_rows, layout.words, config.host_file, beside=beside)
    touch_pages = pins(config, device) if config.host_touch is None else config.host_touch
    stride = layout.stride(device)
    return HostTable(num_rows, layout.words, stride=stride, touch_pages=touch_pages, device=device, beside=beside)
