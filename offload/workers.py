"""Threads beside the training loop, which leave it its cores."""

from concurrent.futures import ThreadPoolExecutor

import torch


def background_worker(name: str, threads: int = 1) -> ThreadPoolExecutor:
    """A thread that does one thing after another and takes no more than `threads` cores for it."""
    # torch keeps this number for each of Python's threads, so the training loop's own stays what it is.
    return ThreadPoolExecutor(1, name, initializer=lambda: torch.set_num_threads(threads))
