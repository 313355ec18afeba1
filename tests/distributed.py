"""Runs a function on several real ranks: processes joined by gloo over loopback."""

import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.warm import warm_context, warm_process

TIMEOUT_S = 600
"""For all that the ranks do together."""
_LEAVE_S = 10


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks and returns what each returned, in rank order.

    `function` and its arguments must be picklable (a module-level function). A rank that raises fails the test
    with that rank's traceback; the others are ended, as all are after `timeout_s` seconds.
    """
    variables = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks, receivers = [], []
    try:
        for rank in range(world_size):
            receiver, sender = warm_context().Pipe(duplex=False)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
            ranks.append(warm_process(_rank, function, sender, args, **variables, **own))
            receivers.append(receiver)
            ranks[-1].start()
            sender.close()
        results = _collect(receivers, time.monotonic() + timeout_s)
        for process in ranks:
            process.join(timeout=_LEAVE_S)
        return results
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(receivers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waited_for = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in results}
        ready = wait([*waited_for], timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {[*waited_for.values()]} were not done in time"
        errors = []
        for receiver in ready:
            rank = waited_for[receiver]
            try:
                result, error = receiver.recv()
            except EOFError:
                result, error = None, "it ended without a result"
            results[rank] = pickle.loads(result) if result else None
            errors += [f"rank {rank} failed:\n{error}"] if error else []
        assert not errors, "\n".join(errors)
    return [results[rank] for rank in range(len(receivers))]


def _rank(function: Callable[..., Any], sender: Connection, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        # A connection's own pickler sends tensors as handles of memory that ends with their sender.
        sender.send((pickle.dumps(function(*args)), None))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send((None, traceback.format_exc()))
