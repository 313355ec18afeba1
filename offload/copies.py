"""Copies of records that are under way, and the ways to come after them."""

from concurrent.futures import Future
from typing import Protocol

from offload.streams import Event, Stream, Streams


class Copy(Protocol):
    """A fetch or a write-back."""

    def done(self) -> bool:
        """Whether it has landed; never waits."""

    def order(self) -> None:
        """Whatever is given to the device, or asked of the same transfers, from now on comes after this copy.

        The host waits only where there is no other way.
        """

    def wait(self) -> None:
        """The host waits until it has landed."""


class WorkerCopy:
    """A copy that a thread makes, from its beginning to its end.

    Args:
        future: of the thread's work.
    """

    def __init__(self, future: "Future[None]") -> None:
        self._future = future

    def done(self) -> bool:
        """See `Copy.done`."""
        return self._future.done()

    def order(self) -> None:
        """See `Copy.order`."""
        self._future.result()

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._future.result()


class StreamCopy:
    """A copy that was given to the device.

    Args:
        event: behind it.
        streams: of the device.
        followers: streams whose coming work is ordered after the copy, beside the stream of the caller.
    """

    def __init__(self, event: Event, streams: Streams, followers: tuple[Stream, ...] = ()) -> None:
        self._event, self._streams, self._followers = event, streams, followers

    def done(self) -> bool:
        """See `Copy.done`."""
        return self._event.query()

    def order(self) -> None:
        """See `Copy.order`."""
        for stream in (self._streams.current(), *self._followers):
            stream.wait_event(self._event)

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._event.synchronize()


class HandedCopy:
    """A copy that a thread gives to the device, piece by piece.

    Args:
        future: of the thread's work, which ends with an event behind the last piece.
        streams: of the device.
    """

    def __init__(self, future: Future[Event], streams: Streams) -> None:
        self._future, self._streams = future, streams

    def done(self) -> bool:
        """See `Copy.done`."""
        return self._future.done() and self._future.result().query()

    def order(self) -> None:
        """See `Copy.order`. The host waits until the thread has given everything to the device."""
        self._streams.current().wait_event(self._future.result())

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._future.result().synchronize()
