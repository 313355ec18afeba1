"""The saves of a run, one after another, while the training loop waits or beside it.

A save beside the loop works on a state that was frozen for it: see `Content`. Its ranks agree over a process group of
their own, in host memory, from the thread that saves: collectives of two threads in one group would pair by chance. So
the loop needs no agreement about how far a save is, and no rank holds a step for another's disk. Each rank's loop may
learn of a save that ended (`take_ended`) at another step; nobody acts on it except by a message.

A save waits for the one before: two at a time would take a second undo log and a second copy of the backbone, and
dropping one would break the promise of `checkpoint.every`.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from offload.device.workers import background_worker
from train.checkpoint.choice import Key
from train.checkpoint.index import Save, Written
from train.checkpoint.listing import folder_name
from train.checkpoint.manifest import Base, Manifest
from train.checkpoint.nodes import Nodes
from train.checkpoint.retention import let_go
from train.checkpoint.save import Saving
from train.checkpoint.together import Failed
from train.config.job import CheckpointConfig
from train.optim.pieces import StatePiece

_NICENESS = 10
"""Of threads of a save beside the loop: a tenth of a core that the loop wants, and all that it leaves (sched(7))."""


@dataclass(frozen=True)
class Content:
    """What a save writes of this rank. Beside the loop, it stays as it is while steps go on.

    Attributes:
        step: steps that were done.
        updates: of the tables; 0 without Engram.
        base: the full save that lacks only the rows that are written; None if all of them are.
        pieces: of the backbone.
        rows: of the tables: ids, records and update counts.
        describe: the manifest of what all ranks have written.
        close: called when nothing is read any more.
    """

    step: int
    updates: int
    base: Base | None
    pieces: Iterable[StatePiece]
    rows: Iterable[tuple[Tensor, Tensor, Tensor]]
    describe: Callable[[Save, Sequence[Written]], Manifest]
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Ended:
    """A save that has ended.

    Attributes:
        step: steps that were done.
        path: the checkpoint; None if there is none.
        error: what went wrong, if anything.
        waited_s: how long the next save has waited for it.
    """

    step: int
    path: Path | None = None
    error: str = ""
    waited_s: float = 0.0


class Saves:
    """See above. All ranks call the same methods in the same order, except for `take_ended`.

    Args:
        folder: of the checkpoints.
        config: the `checkpoint` section.
        passed_over: checkpoints that are known to be damaged or not good; may grow.
        nodes: of the job; nobody else talks over their group while a save is under way.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, passed_over: Collection[Key], nodes: Nodes) -> None:
        self._folder, self._config, self._passed_over, self._nodes = folder, config, passed_over, nodes
        self._thread: Executor | None = None
        self._under_way: Future[Ended] | None = None
        self._ended: list[Ended] = []
        self._full: tuple[Base, int] | None = None  # the newest full save of this process, and its updates
        self._increments = 0  # saves since

    def next_base(self, *, has_rows: bool) -> tuple[Base | None, int]:
        """What the next save adds to, and the updates that are in there; None and 0 if it is to be a full one.

        Waits for the save under way.
        """
        self._settle()
        if not has_rows or self._full is None or self._increments + 1 >= (self._config.incremental or 1):
            return None, 0
        return self._full

    def begin(self, target: Path, step: int) -> Saving:
        """See `Saving.begin`."""
        return Saving.begin(target, step, self._nodes)

    def save(self, content: Content) -> Path:
        """Saves; returns the checkpoint. Raises Failed on all ranks alike if it cannot be written."""
        self._settle()
        return self._save(content)

    def save_beside(self, content: Content, device: torch.device) -> None:
        """Saves on a thread whose device is `device`. `take_ended` reports the outcome."""
        self._settle()
        self._thread = self._thread or background_worker("engram-saves", device, niceness=_NICENESS)
        self._under_way = self._thread.submit(self._save_or_tell, content)

    def take_ended(self, *, wait: bool = False) -> list[Ended]:
        """The saves beside the loop that have ended since the last call.

        Args:
            wait: for the one under way too.
        """
        if wait or (self._under_way and self._under_way.done()):
            self._settle()
        ended, self._ended = self._ended, []
        return ended

    def _settle(self) -> None:
        """Waits for the save under way. Failures other than the disk's are raised here."""
        if self._under_way is None:
            return
        started, under_way, self._under_way = time.perf_counter(), self._under_way, None
        self._ended.append(replace(under_way.result(), waited_s=time.perf_counter() - started))

    def _save_or_tell(self, content: Content) -> Ended:
        try:
            return Ended(content.step, self._save(content))
        except Failed as error:
            return Ended(content.step, error=str(error))
        finally:
            content.close()

    def _save(self, content: Content) -> Path:
        saving = self.begin(self._folder / folder_name(content.step), content.step)
        written = saving.write(content.pieces, content.rows)
        saving.publish(written, lambda: content.describe(saving.save, written).text())
        checksum = let_go(self._folder, content.step, self._config, self._passed_over, self._nodes)
        self._increments += 1
        if content.base is None:
            self._full, self._increments = (Base(content.step, checksum), content.updates), 0
        return saving.target
