"""Runs a function on several real ranks: processes joined by gloo over loopback."""

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks and returns what each returned, in rank order.

    `function` and its arguments must be picklable (a module-level function). A rank that raises fails the test
    with that rank's traceback; the others are ended.
    """
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, queue, args), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        results = dict(_collect(queue, ranks))
    finally:
        for process in ranks:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    return [results[rank] for rank in range(world_size)]


def _collect(queue: Any, ranks: list[Any]) -> list[tuple[int, Any]]:
    collected = []
    while len(collected) < len(ranks):
        if queue.empty() and not any(process.is_alive() for process in ranks):
            raise AssertionError(f"ranks ended without a result: {[p.exitcode for p in ranks]}")
        if queue.empty():
            ranks[0].join(timeout=0.02)
            continue
        rank, result, error = queue.get()
        if error:
            raise AssertionError(f"rank {rank} failed:\n{error}")
        collected.append((rank, result))
    return collected


def _rank(function: Callable[..., Any], rank: int, world_size: int, port: int, queue: Any, args: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        queue.put((rank, function(*args), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
