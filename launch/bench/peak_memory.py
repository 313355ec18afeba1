"""The most memory that something takes while it runs."""

import threading
from pathlib import Path
from typing import Any, Self

_STATUS = Path("/proc/self/status")
_PERIOD_S = 0.002


class PeakMemory:
    """Looks again and again, which takes time: not to be used around what is timed.

    Attributes:
        bytes: at most, beyond what there was at the start: of this process's own, without files in the page cache.
    """

    def __enter__(self) -> Self:
        self._before, self.bytes, self._ended = _own_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engram-peak-memory")
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.bytes = max(self.bytes, _own_bytes() - self._before)


def _own_bytes() -> int:
    lines = _STATUS.read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))
