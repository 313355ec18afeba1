"""Who does a thing after another: threads beside the training loop, which leave it its cores, or the loop itself."""

import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

from offload.device.streams import numbered

P = ParamSpec("P")
T = TypeVar("T")

_INTERVAL_S = 5e-4
"""After which a thread gives the interpreter's lock back to one that wants it; Python's own is ten times as long."""


def background_worker(name: str, device: torch.device, threads: int = 1) -> ThreadPoolExecutor:
    """A thread that does one thing after another.

    Args:
        name: of the thread.
        device: whose work it gives; a GPU without a number is the caller's current one.
        threads: cores that it may take.
    """
    # The training loop lets go of the lock in every call of torch's, thousands in a step.
    sys.setswitchinterval(min(sys.getswitchinterval(), _INTERVAL_S))
    # Told apart here: the current GPU of a new thread is GPU 0, and its first call makes a context there.
    device = numbered(device)

    def begin() -> None:
        # torch keeps this number for each of Python's threads, so the training loop's own stays what it is.
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device.index)

    return ThreadPoolExecutor(1, name, initializer=begin)


class InlineWorker(Executor):
    """Does at once, in the caller's thread, what it is given, and raises at once what goes wrong."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **keywords: P.kwargs) -> Future[T]:
        """See `Executor.submit`; the result is there."""
        done: Future[T] = Future()
        done.set_result(work(*args, **keywords))
        return done
