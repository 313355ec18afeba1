"""Threads beside the training loop, which leave it its cores."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch

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
    on_gpu = device.type == "cuda"
    # Told apart here: the current GPU of a new thread is GPU 0, and its first call makes a context there.
    gpu = torch.cuda.current_device() if on_gpu and device.index is None else device.index

    def begin() -> None:
        # torch keeps this number for each of Python's threads, so the training loop's own stays what it is.
        torch.set_num_threads(threads)
        if on_gpu:
            torch.cuda.set_device(gpu)

    return ThreadPoolExecutor(1, name, initializer=begin)
