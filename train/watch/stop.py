"""Signals that ask a training run to end: heard at any moment, agreed on by all ranks, obeyed between two steps.

A thread hears them, so that time runs out for a rank that is stuck too. Launchers, terminals and Slurm send a signal
twice: what comes within `SAME_S` of the first is the same one.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from train.watch.ending import ENDING, SAME_S


class Answer(NamedTuple):
    """Whether the run is to end, by the number of a signal or 0, and whether a rank wants it to be saved."""

    signum: int
    save: bool


class StopSignals:
    """The signals of one rank, and what all ranks make of theirs. Collective where it says so.

    Args:
        grace_s: seconds between the first signal and the end, whatever the rank is doing then.
        leave: ends this process with a line and an exit code, from any thread.
    """

    def __init__(self, grace_s: float, leave: Callable[[str, int], None]) -> None:
        self._grace_s, self._leave = grace_s, leave
        self._received = 0
        # In host memory: the answer is there before the device has done the step.
        self._group = dist.new_group(backend="gloo")
        self._asked = torch.zeros(2, dtype=torch.int32)
        self._answer: dist.Work | None = None

    def listen(self) -> None:
        """From now on signals are only noted, except those that are ignored; before, they end the process. Collective.

        To be called once, from the main thread, when there is something to save.
        """
        heard, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(heard,), name="engram-signals", daemon=True).start()
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)
                signal.siginterrupt(number, False)
        dist.barrier(self._group)  # no rank saves while another one would still die of a signal

    def ask(self, *, save: bool = False) -> None:
        """Starts asking all ranks whether they have received a signal or want to `save`; nobody waits. Collective."""
        self._asked[0], self._asked[1] = self._received, save
        self._answer = dist.all_reduce(self._asked, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> Answer:
        """What any rank had received or wanted when it asked last; the same on all ranks."""
        if self._answer is None:
            raise RuntimeError("nobody asked")
        self._answer.wait()
        self._answer = None
        signum, save = self._asked.tolist()
        return Answer(signum, save=bool(save))

    def _hear(self, heard: int) -> None:
        while (signum := os.read(heard, 1)[0]) not in ENDING:
            pass
        self._received = signum
        first = time.monotonic()
        name = signal.Signals(signum).name
        while (left_s := first + self._grace_s - time.monotonic()) > 0:
            if not select.select([heard], [], [], left_s)[0]:
                continue
            if os.read(heard, 1)[0] == signal.SIGINT and time.monotonic() - first >= SAME_S:
                self._leave(f"stopped by SIGINT, before what {name} asked for was saved", 128 + signal.SIGINT)
        self._leave(
            f"stopped by {name}: {self._grace_s:g} s were too short to end a step and save; raise checkpoint.grace_s",
            128 + signum,
        )


def _noted(signum: int, frame: object) -> None:
    """The thread has heard it already."""
