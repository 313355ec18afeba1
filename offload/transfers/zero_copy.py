"""Copies of records by kernels that reach over the bus into pinned host memory: no staging, and no thread.

Shape suffixes: R rows of the shard, C slots, U rows of a copy, W words of a record.
"""

from typing import Any

from torch import Tensor

from kernels.records import PROGRAMS, draw_records, fetch_records, write_records
from offload.device.sender import Sender
from offload.device.streams import Streams
from offload.rows.shard import Shard
from offload.transfers.copies import StreamCopy


class ZeroCopyTransfers:
    """One stream per direction, on which a kernel copies records between host memory and the window.

    Args:
        host_RW: the shard's records, as the device sees them. What lies between two of them is padding.
        window_CW: the window's records, on the device, equally far apart.
        shard: the rows.
        streams: of the device.
        programs: of a kernel.
    """

    name = "zero_copy"
    stream_ordered = True

    def __init__(
        self,
        host_RW: Tensor,
        window_CW: Tensor,
        shard: Shard,
        streams: Streams,
        programs: int = PROGRAMS,
    ) -> None:
        self._host_RW, self._window_CW, self._streams = host_RW, window_CW, streams
        self._initial = shard.initial(window_CW.device)
        self._how: dict[str, Any] = {"padded": True, "programs": programs}
        self._in, self._out = streams.new(), streams.new()
        # Sent on the streams that read them: the numbers are then in order before their use.
        self._incoming, self._outgoing = (Sender(window_CW.device, streams, each) for each in (self._in, self._out))

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> StreamCopy:
        """See `Transfers.fetch`."""
        # Whatever still reads the old contents of these slots was given to the caller's stream before.
        self._in.wait_event(self._streams.current().record_event())
        with self._streams.use(self._in):
            rows_U, slots_U = self._incoming.send(rows, slots).take()
            fetch_records(self._host_RW, rows_U[:stored], self._window_CW, slots_U[:stored], **self._how)
            draw_records(self._window_CW, slots_U[stored:], rows_U[stored:], **self._initial)
        return StreamCopy(self._in.record_event(), self._streams, self._in)

    def write_back(self, slots: Tensor, rows: Tensor) -> StreamCopy:
        """See `Transfers.write_back`."""
        # The update of these slots was given to the caller's stream before.
        self._out.wait_event(self._streams.current().record_event())
        with self._streams.use(self._out):
            slots_U, rows_U = self._outgoing.send(slots, rows).take()
            write_records(self._window_CW, slots_U, self._host_RW, rows_U, **self._how)
        return StreamCopy(self._out.record_event(), self._streams, self._in)

    def close(self) -> None:
        """See `Transfers.close`."""
        for stream in (self._in, self._out):
            stream.record_event().synchronize()
