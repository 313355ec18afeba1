"""What ranks on one machine do to each other: for `launch.calibrate.machine`."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from launch.calibrate.network import SEQUENCES, WIDTHS, Network, typical
from offload.host.cores import usable_cores

_TURNS = 12
_EXCHANGED = 1 << 22
"""Bytes that each of two ranks sends the other."""


def exchange_rates(rendezvous: str) -> tuple[float, float]:
    """Bytes per second that one of two ranks sends the other: in an all-to-all, and in gathers and reductions."""
    exchanging, reducing = _on_ranks(2, rendezvous, _exchange)
    return _EXCHANGED / exchanging, _EXCHANGED / reducing


def rate_with_all_busy(rendezvous: str) -> float:
    """Of the rate that a rank has alone, what the slowest has while there is one on each core."""
    cores = usable_cores()
    if cores == 1:
        return 1.0
    alone, together = _on_ranks(cores, rendezvous, _alone_and_together)
    return min(1.0, alone / together)


def _exchange(_: int) -> tuple[float, float]:
    """Of an all-to-all and an all-reduce, in which each rank sends the other as much."""
    sent = torch.zeros(2 * _EXCHANGED // 4)
    received = torch.empty_like(sent)
    summed = torch.zeros(_EXCHANGED // 4)
    return typical(lambda: dist.all_to_all_single(received, sent)), typical(lambda: dist.all_reduce(summed))


def _alone_and_together(rank: int) -> tuple[float, float]:
    """In turns. Other work on the machine delays most what uses all cores: the faster rounds have little of it."""
    work = Network(WIDTHS[0]).work(SEQUENCES)
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(_TURNS):
        for alone in times:
            dist.barrier()
            started = time.perf_counter()
            if rank == 0 or not alone:
                work()
            seconds = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            times[alone].append(float(seconds))
    return faster(times[True]), faster(times[False])


def faster(times: list[float]) -> float:
    """The time that a quarter of them reach."""
    return statistics.quantiles(times, n=4)[0]


def _on_ranks(count: int, rendezvous: str, measure: Callable[[int], tuple[float, float]]) -> tuple[float, float]:
    """What rank 0 of some processes with one thread each measures."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=_as_rank, args=(rank, count, rendezvous, measure, results), daemon=True)
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if results.empty():
        raise RuntimeError(f"{count} ranks could not meet over gloo")
    first, second = results.get()
    return first, second


def _as_rank(
    rank: int, count: int, rendezvous: str, measure: Callable[[int], tuple[float, float]], results: Any
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    found = measure(rank)
    if rank == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()
