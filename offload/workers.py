"""Threads beside the training loop, which leave it its cores."""

from concurrent.futures import ThreadPoolExecutor

import torch


def background_worker(name: str, device: torch.device, threads: int = 1) -> ThreadPoolExecutor:
    """A thread that does one thing after another.

    Args:
        name: of the thread.
        device: whose work it gives; a GPU without a number is the caller's current one.
        threads: cores that it may take.
    """
    on_gpu = device.type == "cuda"
    # Told apart here: the current GPU of a new thread is GPU 0, and its first call makes a context there.
    gpu = torch.cuda.current_device() if on_gpu and device.index is None else device.index

    def begin() -> None:
        # torch keeps this number for each of Python's threads, so the training loop's own stays what it is.
        torch.set_num_threads(threads)
        if on_gpu:
            torch.cuda.set_device(gpu)

    return ThreadPoolExecutor(1, name, initializer=begin)
