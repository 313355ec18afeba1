"""Rows on a trial trip between host memory and slots that are still free: how long does it take?

Shape suffixes: C slots, W words of a record.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from offload.device.streams import Event
from offload.transfers.engine import Transfers

_MOST_ROWS = 1 << 16
"""Each way."""


class Trial:
    """A sample of rows that come in and one of rows that leave, spread over the shard, as many each.

    They travel whole, as rows that were updated do. Host memory keeps what it holds.

    Args:
        num_rows: of this rank's shard.
        window_CW: this rank's window, on the device.
    """

    gb: float
    """GB of records that travel each way, with the padding between them."""

    def __init__(self, num_rows: int, window_CW: Tensor) -> None:
        self._count = min(num_rows // 2, len(window_CW) // 2, _MOST_ROWS)
        self._slots = torch.arange(2 * self._count)
        self._rows = self._slots * (num_rows // max(1, 2 * self._count))
        self.gb = max(1, self._count) * window_CW.stride(0) * window_CW.element_size() / 1e9

    def warm_up(self, engine: Transfers) -> None:
        """Takes all rows there and back, which may have to compile."""
        engine.fetch(self._rows, self._slots, len(self._rows)).wait()
        engine.write_back(self._slots, self._rows).wait()

    def seconds(self, engine: Transfers, beside: Callable[[], Event]) -> float:
        """From the beginning until rows have come in, others left, and what `beside` began is done.

        Args:
            engine: warmed up just before.
            beside: begins what the device, and until it returns this thread, do meanwhile.
        """
        coming, leaving = slice(self._count), slice(self._count, None)
        started = time.perf_counter()
        fetch = engine.fetch(self._rows[coming], self._slots[coming], self._count)
        write_back = engine.write_back(self._slots[leaving], self._rows[leaving])
        computed = beside()
        fetch.wait()
        write_back.wait()
        computed.synchronize()
        return time.perf_counter() - started
