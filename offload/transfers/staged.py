"""Copies of records through pinned staging memory: gathered by the CPU, carried by the GPU's copy engines.

The tables themselves need not be pinned, so they may also be in a file.

Shape suffixes: R rows of the shard, C slots, B rows of a chunk, W words of a record.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import torch
from torch import Tensor

from kernels.records import draw_records
from offload.device.sender import Sender
from offload.device.streams import Event, Streams
from offload.device.workers import background_worker
from offload.host.file_records import FileRecords
from offload.rows.shard import Shard
from offload.spans import span
from offload.transfers.copies import HandedCopy, WorkerCopy

_CHUNK_BYTES = 4 << 20
"""Bytes of records: enough for a copy engine's full rate, few enough that other copies get their turn."""
_CHUNKS = 4
"""Per direction: one is gathered, one on the bus, one scattered, and one spare."""


class StagedTransfers:
    """One worker and one stream per direction, and a ring of chunks between them that is allocated once.

    Args:
        host_RW: the shard's records, in any host memory or in a file.
        window_CW: the window's records, on the device.
        shard: the rows.
        streams: of the device.
        threads: cores of each worker.
    """

    name = "staged"
    stream_ordered = False  # a worker may read host memory only when what was written back has landed there

    def __init__(
        self,
        host_RW: Tensor | FileRecords,
        window_CW: Tensor,
        shard: Shard,
        streams: Streams,
        threads: int = 1,
    ) -> None:
        self._host_RW, self._window_CW = host_RW, window_CW
        self._initial, self._streams = shard.initial(window_CW.device), streams
        chunk_bytes = min(_CHUNK_BYTES, window_CW.nbytes)
        self._chunk_rows = max(1, chunk_bytes // (window_CW.shape[1] * window_CW.element_size()))
        self._in, self._out = streams.new(), streams.new()
        # Sent on the streams that read them: the numbers are then in order before their use.
        self._in_slots, self._out_slots = (Sender(window_CW.device, streams, each) for each in (self._in, self._out))
        self._incoming = deque(self._new_chunk() for _ in range(_CHUNKS))
        self._outgoing = deque(self._new_chunk() for _ in range(_CHUNKS))
        self._fetcher = background_worker("engram-fetch", window_CW.device, threads)
        self._writer = background_worker("engram-writeback", window_CW.device, threads)

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> HandedCopy:
        """See `Transfers.fetch`."""
        free = self._streams.current().record_event()
        return HandedCopy(self._fetcher.submit(span("fetch")(self._fetch), rows, slots, stored, free), self._streams)

    def write_back(self, slots: Tensor, rows: Tensor) -> WorkerCopy:
        """See `Transfers.write_back`."""
        updated = self._streams.current().record_event()
        future: Future[None] = self._writer.submit(span("write back")(self._write_back), slots, rows, updated)
        return WorkerCopy(future)

    def close(self) -> None:
        """See `Transfers.close`."""
        self._fetcher.shutdown()
        self._writer.shutdown()
        for stream in (self._in, self._out):
            stream.record_event().synchronize()

    def _fetch(self, rows: Tensor, slots: Tensor, stored: int, free: Event) -> Event:
        self._in.wait_event(free)
        for part, places in self._chunks(rows[:stored], slots[:stored]):
            chunk = _next(self._incoming)
            records_BW, there_BW = chunk.records_BW[: len(part)], chunk.there_BW[: len(part)]
            _gather(self._host_RW, part, records_BW)
            with self._streams.use(self._in):
                (slots_B,) = self._in_slots.send(places).take()
                _carry(records_BW, there_BW)
                _scatter(there_BW, self._window_CW, slots_B)
            chunk.busy = self._in.record_event()
        with self._streams.use(self._in):
            rows_U, slots_U = self._in_slots.send(rows[stored:], slots[stored:]).take()
            draw_records(self._window_CW, slots_U, rows_U, **self._initial)
        return self._in.record_event()

    def _write_back(self, slots: Tensor, rows: Tensor, updated: Event) -> None:
        self._out.wait_event(updated)
        landing: deque[tuple[_Chunk, Tensor]] = deque()
        for places, part in self._chunks(slots, rows):
            if len(landing) == _CHUNKS - 1:
                self._land(*landing.popleft())
            chunk = _next(self._outgoing)
            with self._streams.use(self._out):
                (slots_B,) = self._out_slots.send(places).take()
                there_BW = chunk.there_BW[: len(part)]
                _gather(self._window_CW, slots_B, there_BW)
                _carry(there_BW, chunk.records_BW[: len(part)])
            chunk.busy = self._out.record_event()
            landing.append((chunk, part))
        while landing:
            self._land(*landing.popleft())

    def _land(self, chunk: "_Chunk", rows: Tensor) -> None:
        chunk.wait()
        _scatter(chunk.records_BW[: len(rows)], self._host_RW, rows)

    def _chunks(self, sources: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(sources.split(self._chunk_rows), targets.split(self._chunk_rows), strict=True)

    def _new_chunk(self) -> "_Chunk":
        return _Chunk(self._window_CW, self._chunk_rows, self._streams)


class _Chunk:
    """Buffers for records, in pinned host memory and on the device."""

    def __init__(self, window_CW: Tensor, rows: int, streams: Streams) -> None:
        self.records_BW = streams.pinned(rows, window_CW.shape[1], dtype=window_CW.dtype)
        self.there_BW = torch.empty(self.records_BW.shape, dtype=window_CW.dtype, device=window_CW.device)
        self.busy: Event | None = None
        """Behind the last work that uses the chunk."""

    def wait(self) -> None:
        """The host waits until the chunk may be used again."""
        if self.busy is not None:
            self.busy.synchronize()


def _gather(records_RW: Tensor | FileRecords, numbers_B: Tensor, gathered_BW: Tensor) -> None:
    if isinstance(records_RW, FileRecords):
        records_RW.fetch(numbers_B, gathered_BW, torch.arange(len(numbers_B)))
        return
    torch.index_select(records_RW, 0, numbers_B, out=gathered_BW)


def _scatter(gathered_BW: Tensor, records_RW: Tensor | FileRecords, numbers_B: Tensor) -> None:
    if isinstance(records_RW, FileRecords):
        records_RW.write(gathered_BW, torch.arange(len(numbers_B)), numbers_B)
        return
    records_RW.index_copy_(0, numbers_B, gathered_BW)


def _carry(from_BW: Tensor, to_BW: Tensor) -> None:
    to_BW.copy_(from_BW, non_blocking=True)


def _next(ring: deque[_Chunk]) -> _Chunk:
    chunk = ring[0]
    ring.rotate(-1)
    chunk.wait()
    return chunk
