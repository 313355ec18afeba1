"""Brings a store's shards from where it lies into the cache, several at once, each once on a machine.

What is used is what has the store's checksum, wherever it came from: a bad server or disk costs time, and never changes
the data.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from itertools import count
from queue import PriorityQueue

import numpy as np

from train.data.remote.retry import persistently
from train.data.stores.shard_cache import SHARD, ShardCache
from train.data.stores.sums import shard_sum
from train.errors import UserError

_THREADS = 8
_LOCKS = 64
_DAMAGED_TRIES = 3
_TELL_EVERY_S = 3.0


class ShardFetcher:
    """Shards by number, from the cache or from where the store lies. May be used from several threads."""

    def __init__(
        self,
        cache: ShardCache,
        folder: str,
        url: str,
        ask: Callable[[int, int], bytes],
        sums: Sequence[bytes],
        bounds: Callable[[int], tuple[int, int]],
        patience_s: float,
    ) -> None:
        """Args: where shards are kept, and the store's folder in it; the token file, for people; gives its bytes from
        one place to another, or raises anything; the shards' checksums; each one's first byte and end; the seconds for
        which a server may fail."""
        self._cache, self._folder, self._url, self._ask = cache, folder, url, ask
        self._sums, self._bounds, self._patience_s = sums, bounds, patience_s
        self._sound: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._coming: dict[int, Future[bytes]] = {}
        self._wanted: PriorityQueue[tuple[int, int, int]] = PriorityQueue()
        self._turn = count()
        self._threads: list[threading.Thread] = []
        self._told = -_TELL_EVERY_S

    @property
    def limit(self) -> int:
        """Bytes that the cache may have."""
        return self._cache.limit

    def take(self, numbers: Iterable[int]) -> dict[int, np.ndarray]:
        """The content of shards, uint8, all of them in memory or mapped.

        Raises:
            UserError: one cannot be fetched, or is not what its checksum says.
        """
        kept = {number: self._kept(number) for number in numbers}
        asked = {number: self._request(number, 0) for number, content in kept.items() if content is None}
        found = {number: content for number, content in kept.items() if content is not None}
        # What was fetched is used itself: the cache may have no room for it, or have lost it again.
        return found | {number: np.frombuffer(each.result(), np.uint8) for number, each in asked.items()}

    def ahead(self, numbers: Iterable[int]) -> None:
        """Has shards brought in the background, after those that somebody waits for. A failure shows in `take`."""
        for number in numbers:
            if not (self._cache.folder / self._name(number)).exists():
                self._request(number, 1)

    def _request(self, number: int, priority: int) -> Future[bytes]:
        with self._lock:
            known = self._coming.get(number)
            if known is not None and priority:
                return known
            future = self._coming.setdefault(number, Future())
            # One that was asked for ahead is in the queue twice then; whoever comes to it second passes on.
            self._wanted.put((priority, next(self._turn), number))
            if len(self._threads) < _THREADS:
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        return future

    def _work(self) -> None:
        while True:
            _, _, number = self._wanted.get()
            with self._lock:
                future = self._coming.get(number)
                if future is None or future.running():
                    continue
                future.set_running_or_notify_cancel()
            try:
                content = self._fetch(number)
            except BaseException as error:
                with self._lock:
                    del self._coming[number]
                future.set_exception(error)
            else:
                with self._lock:
                    del self._coming[number]
                future.set_result(content)

    def _fetch(self, number: int) -> bytes:
        # Of several processes one fetches, and the others find it here.
        with self._cache.alone(f".fetching-{number % _LOCKS}"):
            kept = self._kept(number)
            if kept is not None:
                return kept.tobytes()
            begin, end = self._bounds(number)
            what = f"{self._url}: shard {number + 1:,} of {len(self._sums):,} (bytes {begin:,} to {end:,})"
            content = persistently(what, self._asking(what, number), self._patience_s, self._tell)
            self._cache.keep(self._name(number), content)
        return content

    def _tell(self, line: str) -> None:
        # All threads and ranks meet with the same server.
        with self._lock:
            due = time.monotonic() - self._told >= _TELL_EVERY_S
            self._told = time.monotonic() if due else self._told
        if due:
            print(line, file=sys.stderr, flush=True)

    def _asking(self, what: str, number: int) -> Callable[[], bytes]:
        damaged = count(1)

        def ask() -> bytes:
            content = self._ask(*self._bounds(number))
            if self._is_sound(number, content):
                return content
            if next(damaged) == _DAMAGED_TRIES:
                raise UserError(
                    f"{what} came {_DAMAGED_TRIES} times with another checksum than the store has: the file there is "
                    f"damaged or was replaced; compare it with the one that was prepared (engram data verify), and "
                    f"upload it again"
                )
            raise ValueError("it came with another checksum than the store has")

        return ask

    def _kept(self, number: int) -> np.ndarray | None:
        """A sound shard of the cache; one that is damaged is removed."""
        view = self._cache.view(self._name(number))
        if view is None:
            return None
        if self._sound.get(number) != view.identity:
            if not self._is_sound(number, view.content):
                self._cache.drop(self._name(number))
                return None
            self._sound[number] = view.identity
        return view.content

    def _is_sound(self, number: int, content: bytes | np.ndarray) -> bool:
        begin, end = self._bounds(number)
        return len(content) == end - begin and shard_sum(content) == self._sums[number]

    def _name(self, number: int) -> str:
        return f"{self._folder}/{number:07}{SHARD}"
