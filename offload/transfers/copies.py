"""Copies of records that are under way, and the ways to order work after them."""

from concurrent.futures import Future
from typing import Protocol

from offload.device.streams import Event, Stream, Streams


class Copy(Protocol):
    """A fetch or a write-back."""

    def done(self) -> bool:
        """Whether it has landed; never waits."""

    def order(self) -> None:
        """Work that the caller's stream is given from now on comes after this copy.

        The host waits only where there is no other way.
        """

    def order_fetches(self) -> None:
        """Fetches that the same engine is asked for from now on come after this copy. The host waits as in `order`."""

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

    def order_fetches(self) -> None:
        """See `Copy.order_fetches`."""
        self._future.result()

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._future.result()


class StreamCopy:
    """A copy that was given to the device.

    Args:
        event: behind it.
        streams: of the device.
        fetches: the stream of coming fetches.
    """

    def __init__(self, event: Event, streams: Streams, fetches: Stream) -> None:
        self._event, self._streams, self._fetches = event, streams, fetches

    def done(self) -> bool:
        """See `Copy.done`."""
        return self._event.query()

    def order(self) -> None:
        """See `Copy.order`."""
        self._streams.current().wait_event(self._event)

    def order_fetches(self) -> None:
        """See `Copy.order_fetches`."""
        self._fetches.wait_event(self._event)

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

    def order_fetches(self) -> None:
        """See `Copy.order_fetches`: fetches are in order among themselves."""

    def wait(self) -> None:
        """See `Copy.wait`."""
        self._future.result().synchronize()
