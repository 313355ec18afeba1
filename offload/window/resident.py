"""The whole shard on the device: the reference that the window equals bit by bit."""

from collections.abc import Callable

import torch
from torch import Tensor

from offload.config import OffloadConfig
from offload.device.sender import Sender, Sent
from offload.host.memory import zeros_on
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.window.interface import Traffic, nobody
from offload.window.update_counts import add_update

_FILLED_ROWS = 1 << 20


class ResidentStore:
    """The whole shard on the device: the reference that the window equals bit by bit.

    Args:
        sharding, rank: which rows the shard holds.
        layout, init: of the records.
        device: of the shard.
    """

    engine = None

    def __init__(
        self, sharding: Sharding, rank: int, layout: RecordLayout, init: RowInit, device: torch.device
    ) -> None:
        num_rows = sharding.shard_rows(rank)
        self.records = zeros_on(device, num_rows, layout.stride(device))[:, : layout.words]
        # In parts: drawn values take memory of their own for as long as it takes to copy them.
        for start, part_CW in enumerate(self.records.split(_FILLED_ROWS)):
            places = torch.arange(len(part_CW)) + start * _FILLED_ROWS
            init.fill(layout, part_CW, sharding.global_ids(rank, places).to(device))
        self._counts_R = torch.zeros(num_rows, dtype=torch.uint8, device=device)
        self._sender = Sender(device)
        self._prepared: dict[int, tuple[Tensor, Sent]] = {}
        self._held_O = torch.empty(0, dtype=torch.int64)
        self.traffic = Traffic()
        self.before_change: Callable[[Tensor], object] = nobody

    def prepare(self, step: int, rows: Tensor) -> None:
        """See `RowStore.prepare`."""
        self._prepared[step] = rows, self._sender.send(rows)

    def hold(self, step: int) -> Tensor:
        """See `RowStore.hold`."""
        rows, sent = self._prepared.pop(step)
        self.before_change(rows)
        (self._held_O,) = sent.take()
        self.traffic.requested += len(self._held_O)
        return self._held_O

    def release(self, step: int, *, updated: bool) -> None:
        """See `RowStore.release`."""
        if updated:
            add_update(self._counts_R, self._held_O)

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        return self.records.index_select(0, rows.to(self.records.device))

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """See `RowStore.in_host_memory`."""
        return torch.zeros(len(rows), dtype=torch.bool)

    def flush(self) -> Tensor:
        """See `RowStore.flush`."""
        return self.records

    def update_counts(self) -> Tensor:
        """See `RowStore.update_counts`."""
        return self._counts_R

    def load(self, rows: Tensor, records_UW: Tensor, counts_U: Tensor) -> None:
        """See `RowStore.load`."""
        device = self.records.device
        self.records[rows.to(device)] = records_UW.to(device)
        self._counts_R[rows.to(device)] = counts_U.to(device)

    def reopen(self, config: OffloadConfig) -> None:
        """See `RowStore.reopen`."""
        self._prepared.clear()

    def close(self) -> None:
        """See `RowStore.close`."""
