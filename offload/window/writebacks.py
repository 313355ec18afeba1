"""Write-backs that are under way: their order, and who must wait for which."""

from collections import deque
from typing import NamedTuple

import numpy as np

from offload.transfers.copies import Copy
from offload.window.directory import Slots


class WriteBack(NamedTuple):
    """A copy of some slots to host memory. Copies of one direction land in the order of their numbers."""

    number: int
    slots: Slots
    copy: Copy


class WriteBacks:
    """The write-backs of a window, the oldest first, from their beginning until they have landed.

    Each is first waiting: its slots and rows are its own. Then fetches are ordered after it, to which its slots and
    rows belong from then on, as if it had landed; with an engine that works by streams it may be under way for long
    after that, and whoever changes one of its rows, or reads host memory directly, has to come after it too.

    Args:
        num_slots: slots of the window.
    """

    def __init__(self, num_slots: int) -> None:
        self._waiting: deque[WriteBack] = deque()
        self._ordered: deque[WriteBack] = deque()
        self._last = np.zeros(num_slots, np.int64)  # the number of each slot's latest one; 0 for none
        self._begun = 0

    def __len__(self) -> int:
        """How many have no fetch ordered after them yet."""
        return len(self._waiting)

    @property
    def num_slots(self) -> int:
        """Slots of those, which fetches may take when they are ordered."""
        return sum(len(each.slots) for each in self._waiting)

    def begin(self, slots: Slots, copy: Copy) -> None:
        """A copy of these slots was asked for."""
        self._begun += 1
        self._last[slots] = self._begun
        self._waiting.append(WriteBack(self._begun, slots, copy))

    def order(self) -> Slots:
        """Orders coming fetches behind the oldest waiting one, and returns its slots. The host waits if it must."""
        oldest = self._waiting.popleft()
        oldest.copy.order_fetches()
        if not oldest.copy.done():
            self._ordered.append(oldest)
        return oldest.slots

    def oldest_landed(self) -> bool:
        """Whether the oldest waiting one has landed, so that ordering it takes no time; never waits."""
        while self._ordered and self._ordered[0].copy.done():
            self._ordered.popleft()
        return bool(self._waiting) and self._waiting[0].copy.done()

    def last_of(self, slots: Slots) -> Copy | None:
        """The last ordered one of any of these slots: once it has landed, so have all of them; None if it has."""
        if not self._ordered:
            return None
        number = self._last[slots].max(initial=0)
        return next((each.copy for each in self._ordered if each.number == number), None)

    def land(self) -> None:
        """The host waits until all ordered ones have landed."""
        while self._ordered:
            self._ordered.popleft().copy.wait()
