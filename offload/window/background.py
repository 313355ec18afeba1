"""A store that decides on the window's coming steps beside the training loop, which only gives work to the GPU."""

from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from offload.device.workers import background_worker
from offload.window.interface import Traffic
from offload.window.store import WindowStore


class BackgroundStore:
    """A window whose work for each row is done by a thread of its own.

    Which slots the rows of a step get, and who leaves for them, takes the host tens of milliseconds for a step of half
    a million rows. Done by the loop between two steps, the GPU would wait for it; here it goes on while the loop gives
    the GPU the step's work. The window is asked the same, in the same order, by one thread at a time, but for
    `hand_out`, which touches nothing but a step that is admitted. So the bits are the same.

    Args:
        window: made with `may_wait`. Copies that the thread asks for are ordered behind what the device's default
            stream was given by then, which is at least what it was given when `prefetch` was called.
    """

    def __init__(self, window: WindowStore) -> None:
        self._window = window
        self._thread = background_worker("engram-window", window.records.device)
        self._posted: list[Future[None]] = []
        self._prefetches: dict[int, Future[bool]] = {}
        self._no_room = False
        self.records = window.records

    @property
    def traffic(self) -> Traffic:
        """See `RowStore.traffic`."""
        return self._window.traffic

    def take_traffic(self) -> Traffic:
        """See `RowStore.take_traffic`."""
        return self._settled().take_traffic()

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """See `RowStore.prefetch`. Always True: after one that finds no room, the others wait for the next time."""
        known = self._prefetches.get(step)
        if known is None or (known.done() and not known.exception() and not known.result()):
            self._prefetches[step] = self._thread.submit(self._prefetch, step, rows)
        return True

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """See `RowStore.acquire`."""
        self.prefetch(step, rows)
        with self.traffic.waiting():
            # Asked before the last step was finished, it may have found no room that is there now.
            admitted = self._prefetches.pop(step).result() or self._thread.submit(self._prefetch, step, rows).result()
        if not admitted:
            window, self._no_room = self._settled(), False
            return window.acquire(step, rows)
        places_O = self._window.hand_out(step)
        self._post(lambda: self._window.land(step))
        return places_O

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """See `RowStore.finish`. Done by the thread, behind what it was asked before."""
        self._post(lambda: self._finish(step, rows, updated))

    def read(self, rows: Tensor) -> Tensor:
        """See `RowStore.read`."""
        return self._settled().read(rows)

    def in_host_memory(self, rows: Tensor) -> Tensor:
        """See `RowStore.in_host_memory`."""
        return self._settled().in_host_memory(rows)

    def flush(self) -> Tensor:
        """See `RowStore.flush`."""
        return self._settled().flush()

    def load(self, rows: Tensor, records_UW: Tensor) -> None:
        """See `RowStore.load`."""
        self._settled().load(rows, records_UW)

    def close(self) -> None:
        """See `RowStore.close`."""
        self._thread.shutdown()
        self._window.close()

    def _post(self, work: Callable[[], None]) -> None:
        """Has the thread do something that nobody waits for; what went wrong with the last of it is raised now."""
        while self._posted and self._posted[0].done():
            self._posted.pop(0).result()
        self._posted.append(self._thread.submit(work))

    def _settled(self) -> WindowStore:
        """The window, when nobody else is at work on it."""
        with self.traffic.waiting():
            for prefetch in self._prefetches.values():
                prefetch.result()
            for work in self._posted:
                work.result()
        self._posted.clear()
        return self._window

    def _finish(self, step: int, rows: Tensor, updated: bool) -> None:
        self._window.finish(step, rows, updated=updated)
        self._no_room = False

    def _prefetch(self, step: int, rows: Tensor) -> bool:
        # Steps are admitted in their order.
        self._no_room = self._no_room or not self._window.prefetch(step, rows)
        return not self._no_room
