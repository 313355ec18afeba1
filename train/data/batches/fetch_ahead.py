"""Has what coming batches read fetched while earlier ones are trained, where sources lie elsewhere.

The loader is asked for a batch as early as rows are planned; from there this reaches further ahead, as the text of a
batch, like its rows, follows from its number.
"""

import os
import threading
from collections.abc import Callable, Iterable

from train.data.batches.packing import Pieces
from train.data.stores.shards import ShardedTokens


class FetchAhead:
    """Follows a loader on a thread of its own.

    Args:
        pieces: what a step reads of which sources, of those that lie elsewhere.
        steps: how far to reach.
    """

    def __init__(self, pieces: Callable[[int], Iterable[tuple[ShardedTokens, Pieces]]], steps: int) -> None:
        self._pieces, self._steps = pieces, steps
        self._changed = threading.Condition()
        self._at, self._next = -1, 0
        self._shards: dict[int, int] = {}
        self._room = 0
        self._thread: threading.Thread | None = None

    def reach(self, step: int) -> None:
        """A step's batch is being read: fetches what those after it need."""
        if not self._steps:
            return
        with self._changed:
            self._next = step + 1 if step < self._at else max(self._next, step + 1)
            self._at = step
            self._shards = {ahead: count for ahead, count in self._shards.items() if step < ahead < self._next}
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_go_on)
                step, room = self._next, self._room - sum(self._shards.values())
                self._next += 1
            try:
                asked = self._ask(step, room)
            except Exception:  # whoever reads the step meets it
                asked = 0
            with self._changed:
                self._shards[step] = asked

    def _may_go_on(self) -> bool:
        held = sum(self._shards.values())
        return self._next <= self._at + self._steps and (not held or held < self._room)

    def _ask(self, step: int, room: int) -> int:
        asked = 0
        for tokens, pieces in self._pieces(step):
            # Half of the cache is for what is read again; the ranks of a machine share it.
            self._room = tokens.room // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            # One token further, which is the last one's label.
            asked += tokens.ahead(pieces.starts_P, pieces.lengths_P + 1, max(1, room or self._room) - asked)
        return asked
