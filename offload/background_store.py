"""A store that decides on the window's coming steps beside the training loop, which only gives work to the GPU."""

from concurrent.futures import Future

from torch import Tensor

from offload.store import RowStore, Traffic
from offload.workers import background_worker


class BackgroundStore:
    """A store whose `prefetch` is carried out by a thread of its own.

    Which slots the rows of a step get, and who leaves for them, takes the host tens of milliseconds for a step of half
    a million rows. Done by the loop between two steps, the GPU would wait for it; here it goes on while the loop gives
    the GPU the step's work. The store is asked the same, in the same order, by one thread at a time: whatever needs its
    answers waits for the thread first. So the bits are the same.

    Args:
        store: the store. Copies that the thread asks for are ordered behind what the device's default stream was given
            by then, which is at least what it was given when `prefetch` was called.
    """

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self._thread = background_worker("engram-window", store.records.device)
        self._prefetches: list[Future[None]] = []
        self._no_room = False
        self.records = store.records

    @property
    def traffic(self) -> Traffic:
        """See `RowStore.traffic`."""
        return self._settled().traffic

    def prefetch(self, step: int, rows: Tensor) -> bool:
        """See `RowStore.prefetch`. Always True: after one that finds no room, the others wait for the next time."""
        self._prefetches.append(self._thread.submit(self._prefetch, step, rows))
        return True

    def acquire(self, step: int, rows: Tensor) -> Tensor:
        """See `RowStore.acquire`."""
        return self._settled().acquire(step, rows)

    def finish(self, step: int, rows: Tensor, *, updated: bool) -> None:
        """See `RowStore.finish`."""
        self._settled().finish(step, rows, updated=updated)

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
        self._store.close()

    def _settled(self) -> RowStore:
        """The store, when nobody else is at work on it."""
        prefetches, self._prefetches = self._prefetches, []
        if prefetches:
            with self._store.traffic.waiting():
                for prefetch in prefetches:
                    prefetch.result()
        self._no_room = False
        return self._store

    def _prefetch(self, step: int, rows: Tensor) -> None:
        if self._no_room:
            return
        traffic = self._store.traffic
        waited_s = traffic.waited_s
        self._no_room = not self._store.prefetch(step, rows)
        traffic.waited_s = waited_s  # not the loop
