"""Workers that do one thing after another: threads beside the training loop, which leave it its cores, or the loop."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from offload.device.streams import numbered

P = ParamSpec("P")
T = TypeVar("T")

_INTERVAL_S = 5e-4
"""After which a thread yields the GIL to one that wants it; Python's default is ten times as long."""


def background_worker(name: str, device: torch.device, threads: int = 1, niceness: int = 0) -> ThreadPoolExecutor:
    """A thread that does one thing after another.

    Args:
        name: of the thread.
        device: what it gives work to; a GPU without a number is the caller's current one.
        threads: cores that it may use.
        niceness: how far it and the threads that it starts stand back where cores are short, as `nice(1)` counts. On
            Linux alone, where a thread has one of its own.
    """
    # The training loop releases the GIL in every call of torch's, thousands per step.
    sys.setswitchinterval(min(sys.getswitchinterval(), _INTERVAL_S))
    # Determined here: the current GPU of a new thread is GPU 0, and its first call makes a context there.
    device = numbered(device)

    def begin() -> None:
        # torch keeps this number for each of Python's threads, so the training loop's own does not change.
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device.index)
        if niceness and sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + niceness)

    return ThreadPoolExecutor(1, name, initializer=begin)


class InlineWorker(Executor):
    """Does what it is given at once, in the caller's thread, and raises at once what goes wrong."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> Future[T]:
        """See `Executor.submit`; the result is ready."""
        done: Future[T] = Future()
        done.set_result(work(*args, **keywords))
        return done
