"""The heartbeat of a rank: a small file in the run's folder that says where the rank is, kept fresh by a thread.

Where not all ranks share the folder, it is in the job's store (that of `torch.distributed`, on the host of rank 0) too.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, TypeVar

if TYPE_CHECKING:
    import torch.distributed as dist  # `engram status` reads beats without PyTorch

HEARTBEATS = "heartbeats"
"""Folder, in that of the run, with a file for each rank."""
SLOWEST_BEAT_S = 5.0
"""Longest time between two beats."""
_FILE_BYTES = 512
_READS, _AGAIN_S = 3, 0.01

Stage = Literal["plan", "fetch", "exchange", "compute", "evaluate", "save"]
T = TypeVar("T")
Memory = Callable[[], tuple[int, int]]


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself.

    Attributes:
        rank, host, pid: who it is.
        step: that it is in, from 1.
        stage: of the step.
        entered: stages that it has entered since the start of the process; equal on ranks that are equally far.
        since: when it entered this one, in seconds since 1970 by its own clock.
        written: when this was written, by the same clock.
        host_bytes, device_peak_bytes: memory that it takes, as `train.memory` counts.
    """

    rank: int
    host: str
    pid: int
    step: int
    stage: Stage
    entered: int
    since: float
    written: float
    host_bytes: int = 0
    device_peak_bytes: int = 0

    @classmethod
    def heard(cls, store: "dist.Store", rank: int) -> Self | None:
        """A rank's last beat in a store; None if it has left none. Raises RuntimeError where it is out of reach."""
        key = _key(rank)
        return cls(**json.loads(store.get(key))) if store.check([key]) else None

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """A rank's last beat; None if it has left none that can be read."""
        for _ in range(_READS):
            try:
                return cls(**json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                time.sleep(_AGAIN_S)  # it may be in the middle of the next one
        return None


class Heartbeat:
    """Where this rank is, and the thread that tells it.

    Args:
        folder: of the run.
        rank: of this process.
        every_s: time between two beats.
        on_beat: called by the thread after each.
        store: which beats go to as well.
        memory: bytes that this process takes on the host and, at most so far, on the device; from any thread.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        every_s: float,
        on_beat: Callable[[], None] = lambda: None,
        store: "dist.Store | None" = None,
        memory: Memory = lambda: (0, 0),
    ) -> None:
        self.path, self._store, self._memory = beat_path(folder, rank), store, memory
        self._rank, self._every_s, self._on_beat = rank, min(every_s, SLOWEST_BEAT_S), on_beat
        self._at: tuple[int, Stage, int, float] = (0, "plan", 0, time.time())  # one object: the thread sees all or none
        self._ended = threading.Event()

    def start(self) -> None:
        """Starts beating; the first beat is there when this returns.

        Raises:
            OSError: it cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.beat()
        threading.Thread(target=self._keep_beating, name="engram-heartbeat", daemon=True).start()

    def enter(self, stage: Stage, step: int | None = None) -> None:
        """This rank enters a stage, of `step` (from 1) or of the same step as before. Costs next to nothing."""
        self._at = (self._at[0] if step is None else step, stage, self._at[2] + 1, time.time())

    def each(self, stage: Stage, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which enters the stage again: what takes long, and makes progress."""
        for item in items:
            self.enter(stage)
            yield item

    def stop(self) -> None:
        """Stops beating, and leaves the last beat."""
        self._ended.set()

    def now(self) -> Beat:
        """Where this rank is."""
        step, stage, entered, since = self._at
        return Beat(self._rank, platform.node(), os.getpid(), step, stage, entered, since, time.time(), *self._memory())

    def beat(self) -> None:
        """Writes where this rank is now."""
        text = json.dumps(asdict(self.now())).ljust(_FILE_BYTES - 1) + "\n"
        # In place: on a network disk another host sees a renamed file only once its cache of names has expired.
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, text.encode(), 0)
        finally:
            os.close(file)
        if self._store:
            with suppress(RuntimeError):  # its host is lost: what waits for that one ends by itself
                self._store.set(_key(self._rank), text)

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._every_s):
            with suppress(OSError):  # a full disk is reported by the next save
                self.beat()
            self._on_beat()


def forget_beats(folder: Path) -> None:
    """Empties what ranks of an earlier start have left. In place, as they are written.

    Raises:
        OSError: they cannot be written.
    """
    for path in (folder / HEARTBEATS).glob("rank-*.json"):
        os.truncate(path, 0)


def beat_path(folder: Path, rank: int) -> Path:
    """The file of a rank's heartbeat in a run's folder."""
    return folder / HEARTBEATS / f"rank-{rank:05d}.json"


def _key(rank: int) -> str:
    return f"heartbeat-{rank}"
