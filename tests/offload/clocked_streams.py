"""Streams that check their order: two accesses to the same memory must be ordered, whatever the timing.

Every stream, and the host, counts what it was given, and knows how much of the others' work comes before its next
piece of work (a vector clock). Work is done at once; what is checked is that a device, which may be as slow as it
likes, could not have done it in another order.
"""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from offload.rows.updater import ReadRows
from offload.tables import EngramTables
from offload.transfers import open as transfers
from offload.transfers import zero_copy as transfers_zero_copy
from offload.window.store import WindowStore

Clock = dict[str, int]
HOST = "host"


class Race(AssertionError):
    """Two accesses that nothing puts in order."""


class ClockedStream:
    """A stream with the clock of its next piece of work."""

    def __init__(self, owner: "ClockedStreams", name: str) -> None:
        self.owner, self.name, self.clock = owner, name, {name: 0}

    def record_event(self) -> "ClockedEvent":
        self.launch()
        return ClockedEvent(self.owner, self.name, dict(self.clock))

    def wait_event(self, event: "ClockedEvent") -> None:
        if (self.name, event.stream) not in self.owner.ignored:
            join(self.clock, event.clock)

    def launch(self) -> None:
        """A piece of work is given: the host had come so far."""
        join(self.clock, self.owner.host.clock if self is not self.owner.host else {})
        self.clock[self.name] += 1


class ClockedEvent:
    """A mark; whether it is reached, when asked, is up to chance."""

    def __init__(self, owner: "ClockedStreams", stream: str, clock: Clock) -> None:
        self.owner, self.stream, self.clock = owner, stream, clock

    def query(self) -> bool:
        if self.owner.chance.random() < self.owner.lag:
            return False
        join(self.owner.host.clock, self.clock)
        return True

    def synchronize(self) -> None:
        self.owner.host_waits += 1
        join(self.owner.host.clock, self.clock)


class ClockedStreams:
    """The streams of a device that is as slow as `lag` says.

    Args:
        lag: how often an event that is asked for is not reached yet; 1 for a device that never is.
        seed: of chance.
        ignored: pairs (waiting stream, stream of the event): waits that are left out, to see that it is noticed.

    Attributes:
        host_waits: how often the host waited.
        accesses: pairs of accesses that were checked.
        fetched, drawn, written: rows of each copy.
    """

    def __init__(self, lag: float, seed: int = 0, ignored: Iterable[tuple[str, str]] = ()) -> None:
        self.lag, self.chance, self.ignored = lag, random.Random(seed), set(ignored)
        self.host, self.compute = ClockedStream(self, HOST), ClockedStream(self, "compute")
        self._names = iter(["in", "out"])
        self._current = self.compute
        self._writes: dict[tuple[str, int], tuple[str, int]] = {}
        self._reads: dict[tuple[str, int], Clock] = {}
        self.host_waits = self.accesses = 0
        self.fetched: list[int] = []
        self.drawn: list[int] = []
        self.written: list[int] = []

    def new(self) -> ClockedStream:
        return ClockedStream(self, next(self._names))

    def current(self) -> ClockedStream:
        return self._current

    @contextmanager
    def use(self, stream: ClockedStream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    def pin(self, tensor: Tensor) -> Tensor:
        return tensor

    def reads(self, tensor: Tensor) -> bool:
        return True

    def lend(self, tensor: Tensor) -> None:
        pass

    def work(self, *, reads: Any = (), writes: Any = (), by: ClockedStream | None = None) -> None:
        """A piece of work on the current stream: (kind of memory, numbers) that it reads and writes.

        Raises:
            Race: an earlier access to the same memory may not be over.
        """
        stream = by or self._current
        stream.launch()
        for kind, numbers in reads:
            for place in ((kind, int(number)) for number in np.asarray(numbers).ravel()):
                self._require(stream, place, self._writes.get(place), "reads", "written")
                self._reads.setdefault(place, {})[stream.name] = stream.clock[stream.name]
        for kind, numbers in writes:
            for place in ((kind, int(number)) for number in np.asarray(numbers).ravel()):
                self._require(stream, place, self._writes.get(place), "writes", "written")
                for reader in self._reads.pop(place, {}).items():
                    self._require(stream, place, reader, "writes", "read")
                self._writes[place] = stream.name, stream.clock[stream.name]

    def _require(self, stream: ClockedStream, place: Any, other: tuple[str, int] | None, does: str, done: str) -> None:
        self.accesses += 1
        if other is not None and stream.clock.get(other[0], 0) < other[1]:
            raise Race(f"{stream.name} {does} {place} while it is {done} by {other[0]}")


def join(clock: Clock, other: Clock) -> None:
    """Whatever comes before the other comes before this one, too."""
    for name, count in other.items():
        clock[name] = max(clock.get(name, 0), count)


@contextmanager
def watched(streams: ClockedStreams) -> Iterator[None]:
    """All tables opened inside, with engine=zero_copy, have their work put on these streams and their order checked."""
    fetch, draw, write, read, flush = (
        transfers_zero_copy.fetch_records,
        transfers_zero_copy.draw_records,
        transfers_zero_copy.write_records,
        WindowStore.read,
        WindowStore.flush,
    )

    def fetch_records(host: Tensor, rows: Tensor, window: Tensor, slots: Tensor, **options: Any) -> None:
        streams.work(reads=[("row", rows)], writes=[("slot", slots)])
        streams.fetched.append(len(rows))
        fetch(host, rows, window, slots, **options)

    def draw_records(window: Tensor, slots: Tensor, rows: Tensor, **options: Any) -> None:
        streams.work(writes=[("slot", slots)])
        streams.drawn.append(len(slots))
        draw(window, slots, rows, **options)

    def write_records(window: Tensor, slots: Tensor, host: Tensor, rows: Tensor, **options: Any) -> None:
        streams.work(reads=[("slot", slots)], writes=[("row", rows)])
        streams.written.append(len(rows))
        write(window, slots, host, rows, **options)

    def read_rows(store: WindowStore, rows: Tensor) -> Tensor:
        slots = store._directory.slots(rows.numpy())
        landed = slots[(slots >= 0) & ~np.isin(slots, store._admissions.slots_in_flight())]
        streams.work(reads=[("slot", landed)])
        records = read(store, rows)
        streams.work(reads=[("row", rows.numpy()[slots < 0])], by=streams.host)
        return records

    def flush_rows(store: WindowStore) -> Tensor:
        records_RW = flush(store)
        streams.work(reads=[("row", np.arange(len(records_RW)))], by=streams.host)
        return records_RW

    with (
        mock.patch.object(transfers, "streams_of", return_value=streams),
        mock.patch.object(transfers_zero_copy, "fetch_records", fetch_records),
        mock.patch.object(transfers_zero_copy, "draw_records", draw_records),
        mock.patch.object(transfers_zero_copy, "write_records", write_records),
        mock.patch.object(WindowStore, "read", read_rows),
        mock.patch.object(WindowStore, "flush", flush_rows),
    ):
        yield


def watch_updates(tables: EngramTables, streams: ClockedStreams) -> None:
    """The step's rows are read and updated on the stream of the model."""
    updater = tables._shard.updater
    read, update = updater.read, updater.update_at

    def reading(records_CW: Tensor, slots_U: Tensor, *args: Any, **keywords: Any) -> Any:
        streams.work(reads=[("slot", slots_U)])
        return read(records_CW, slots_U, *args, **keywords)

    def updating(rows: ReadRows, *args: Any, **keywords: Any) -> None:
        streams.work(writes=[("slot", rows.placed.slots_U)])
        update(rows, *args, **keywords)

    updater.read, updater.update_at = reading, updating  # type: ignore[method-assign]
