"""What the training loop tells those that watch it, and asks them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from train.watch.hang import HangWatch
from train.watch.heartbeat import Memory, Stage, T
from train.watch.stop import Answer, StopSignals


class Watch:
    """Nobody watches. What is called here is called by all ranks in the same order, so it may be collective."""

    def enter(self, stage: Stage, step: int | None = None) -> None:
        """A stage begins, of a step (from 1) or of the same one as before."""

    def each(self, stage: Stage, items: Iterable[T]) -> Iterable[T]:
        """The items of a stage that takes long: each is progress."""
        return items

    def begun(self) -> None:
        """The first step is done: from now on there is something to save."""

    def ask(self, *, save: bool = False) -> None:
        """Starts asking all ranks whether the run is to end, or to be saved as this one wants with `save`."""

    def answer(self) -> Answer:
        """What any of them said; the same on all ranks."""
        return Answer(0, save=False)


class RunWatch(Watch):
    """Watches a run: its signals, its heartbeat, and hangs.

    Args:
        folder: of the run.
        rank: of this process.
        ranks: that see the folder.
        hang_s: see `train.hang_s`.
        signals: of this rank.
        leave: ends this process when the run hangs, from a thread.
        memory: see `train.watch.heartbeat.Heartbeat`.
        store: of the job, if not all ranks see the folder.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        ranks: Sequence[int],
        *,
        hang_s: float | None,
        signals: StopSignals,
        leave: Callable[[BaseException], None],
        memory: Memory,
        store: dist.Store | None = None,
    ) -> None:
        self._signals = signals
        self._hang = HangWatch(folder, rank, ranks, hang_s or float("inf"), leave, store, memory)
        self._heartbeat = self._hang.heartbeat
        self._heartbeat.start()

    def enter(self, stage: Stage, step: int | None = None) -> None:
        """See `Watch`."""
        self._heartbeat.enter(stage, step)

    def each(self, stage: Stage, items: Iterable[T]) -> Iterable[T]:
        """See `Watch`."""
        return self._heartbeat.each(stage, items)

    def begun(self) -> None:
        """See `Watch`."""
        self._signals.listen()
        self._hang.begin()

    def ask(self, *, save: bool = False) -> None:
        """See `Watch`."""
        self._signals.ask(save=save)

    def answer(self) -> Answer:
        """See `Watch`."""
        return self._signals.answer()

    def close(self) -> None:
        """Nobody beats or looks for hangs any more; signals are still only noted."""
        self._heartbeat.stop()
