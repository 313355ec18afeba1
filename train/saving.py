"""When a run is saved: every so many steps or minutes, at its end, and before it ends for another reason."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.content import Now
from train.checkpoint.together import Failed
from train.config.job import JobConfig
from train.errors import Interrupted
from train.report.meter import Meter
from train.report.reporter import Reporter
from train.watch.watch import Watch

_WORTH_TELLING_S = 1.0
"""A save's wait for the one before is reported from this many seconds on."""


class RunSaves:
    """Saves a run and reports it. All ranks call the same methods in the same order.

    Args:
        job: its config.
        checkpoints: where states are saved.
        state: what is saved.
        reporter, watch: are told of it.
        meter: does not count the time.
        start: steps that are done, in a state that is on the disk.
    """

    def __init__(
        self,
        job: JobConfig,
        checkpoints: Checkpoints,
        state: Callable[[], Now],
        reporter: Reporter,
        watch: Watch,
        meter: Meter,
        start: int,
    ) -> None:
        self._config, self._last = job.checkpoint, job.train.steps
        self._checkpoints, self._state, self._meter = checkpoints, state, meter
        self._reporter, self._watch = reporter, watch
        self._kept = start  # steps done in the state that is on the disk, or from which the run continued
        self._newest: Path | None = None  # that state, if this run has saved it
        self._began = time.monotonic()  # the newest save, or the run

    @property
    def overdue(self) -> bool:
        """Whether this rank's clock says that the last save was long ago."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._began >= 60 * minutes

    def in_time(self, done: int, *, overdue: bool) -> Path | None:
        """Saves after `done` steps if it is time to, beside the loop if it may.

        Args:
            done: steps.
            overdue: whether it is so on any rank; the same on all of them.

        Returns:
            the checkpoint, if there is one when this returns.
        """
        every, last = self._config.every, done == self._last
        due = every is not None and (done % every == 0 or last)
        if not due and not overdue:
            return None
        if self._config.asynchronous and not last:
            self._watch.enter("save")
            with self._meter.pause():
                self._checkpoints.save_beside(done, self._state(), ephemeral=not due)
            self._began = time.monotonic()
            return None
        try:
            return self.now(done, ephemeral=not due)
        except Failed as error:
            if last:
                raise
            self._tell_unsaved(done, error)
            return None

    def now(self, done: int, *, ephemeral: bool = False) -> Path:
        """Saves the state after `done` steps, and waits for it. Raises Failed on all ranks if it cannot be written."""
        self.tell(wait=True)
        if self._newest and self._kept == done:
            return self._newest
        self._watch.enter("save")
        self._began = time.monotonic()
        with self._meter.pause():
            self._newest = self._checkpoints.save(done, self._state(), ephemeral=ephemeral)
        self._reporter.saved(self._newest)
        self._kept = done
        return self._newest

    def before(self, step: int) -> str:
        """Saves what was done before `step` (from 0), if the run saves at all; says so, to be added to a line."""
        if self._config.every is None:
            return ""
        self.tell(wait=True)
        if step == self._kept:
            return ""
        path = self.now(step)
        # The first rank that ends has the launcher end all; rank 0 may only now be writing down that it saved.
        dist.barrier(self._checkpoints.nodes.group)
        return f"; {step} steps are saved in {path}, the same command goes on from there"

    def interrupt(self, done: int, signum: int) -> NoReturn:
        """Ends the run after `done` steps, once they are saved."""
        told = f"interrupted by {signal.Signals(signum).name} after step {done}"
        if self._config.every is None:
            raise Interrupted(f"{told}: checkpoint.every is null, nothing was saved", 128 + signum)
        path = self.now(done)
        # Nobody leaves while another rank is still within the save.
        self._watch.ask()
        self._watch.answer()
        told += f": all is saved in {path}, and the same command goes on from there"
        self._reporter.message(told)
        raise Interrupted(told, self._config.interrupted_exit)

    def tell(self, *, wait: bool = False) -> None:
        """Reports the saves beside the loop that have ended, or with `wait` all of them."""
        for ended in self._checkpoints.take_ended(wait=wait):
            if ended.path:
                self._kept, self._newest = ended.step, ended.path
                self._reporter.saved(ended.path)
            else:
                self._tell_unsaved(ended.step, ended.error)
            if ended.waited_s > _WORTH_TELLING_S:
                self._reporter.message(
                    f"the save after that of step {ended.step} waited {ended.waited_s:.0f} s for it: the disk does not "
                    "keep up, raise checkpoint.every"
                )

    def _tell_unsaved(self, step: int, error: object) -> None:
        self._reporter.message(f"step {step} was not saved: {error}; training goes on")
