"""Measures this machine's numbers, as hardware.yaml has them for GPUs: a CPU's, whose ranks share its cores.

What a GPU's bus would be is here a copy of records in memory, unless the job emulates a link (`offload.emulate_link`).
A rank computes on one core. Each number is the best of some rounds: other work disturbs the rest.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from launch.plan.launches import launch_count
from model.census import count_model
from model.config import ModelConfig
from model.flops import flops_per_token
from model.transformer import LanguageModel
from offload.config import TableOptimizerConfig
from offload.rows.records import RecordLayout
from offload.rows.updater import RowUpdater
from offload.window.open import open_directory
from train.machine import usable_cores

_ROUNDS = 5
_COLUMNS, _ROWS = 80, 1 << 15
_LENGTH, _SEQUENCES = 128, 16
_EXCHANGED = 1 << 22
"""Bytes that each of two ranks sends the other."""


def calibrated(told: Callable[[str], object], rendezvous: str) -> dict[str, Any]:
    """A catalogue with one machine, `here`, and one network, `loopback`; about a minute.

    Args:
        told: is told what is measured.
        rendezvous: a path that does not exist, at which two ranks meet.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        told("a small network")
        flops, launch = _model_numbers()
        told("memory")
        copied, records = _copy_rate(), _record_rate()
        told("rows")
        read, update = _row_seconds()
        told("slots")
        decide = _decide_seconds()
        told("two ranks' exchange")
        exchanged = _exchange_rate(rendezvous)
    finally:
        torch.set_num_threads(before)
    link = dict.fromkeys(
        ("copy_engine_bytes_per_second", "fetch_bytes_per_second", "write_back_bytes_per_second"), records
    )
    return {
        "gpus": {
            "here": {
                "device": {
                    "overlaps_launches": False,
                    "flops_per_second": flops,
                    "memory_bytes": float(psutil.virtual_memory().total),
                    "memory_bytes_per_second": copied,
                    "exchange_bytes_per_second": exchanged,
                },
                "link": link | {"write_back_with_4_programs": 1.0, "both_directions": 1.0, "beside_model": 1.0,
                                "lost_to_copies": 0.0},
                "host": {"launch_seconds": launch, "lost_to_each_thread": 0.0, "factor": 1.0,
                         "decide_seconds": decide},
                "rows": {"read_seconds": read, "update_seconds": update, "draw_seconds": 4 * _COLUMNS / copied},
                "backbone": {"optimizer_bytes": 30.0, "optimizer_launches": 200},
                "node": {"memory_bytes": float(psutil.virtual_memory().total), "dram_bytes_per_second": copied,
                         "cores": usable_cores()},
            }
        },
        "networks": {"loopback": {"bytes_per_second": exchanged, "ports": "node", "latency_seconds": 1e-4}},
    }  # fmt: skip


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest round, after one that does not count."""
    work()
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return max(min(times), 1e-9)


def _copy_rate() -> float:
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source))


def _record_rate() -> float:
    layout = RecordLayout.of(_COLUMNS, TableOptimizerConfig())
    records = torch.zeros(4 * _ROWS, layout.words)
    rows = torch.randperm(4 * _ROWS)[:_ROWS].sort().values
    taken = torch.empty(_ROWS, layout.words)
    return taken.nbytes / _best(lambda: torch.index_select(records, 0, rows, out=taken))


def _model_numbers() -> tuple[float, float]:
    """Operations per second, and seconds of Python and PyTorch for each launch: from a small network's forward and
    backward over few tokens and over many. The rate is that of products of a few hundred columns with everything
    between them, not of products alone."""
    config = ModelConfig(vocab_size=1024, hidden_size=128, num_layers=3, dense_hidden_size=384)
    network = LanguageModel(config)
    each = flops_per_token(config, count_model(network), _LENGTH).total

    def seconds(sequences: int) -> float:
        tokens_BT = torch.randint(config.vocab_size, (sequences, _LENGTH))
        positions_BT = torch.arange(_LENGTH).expand(sequences, _LENGTH)
        return _best(lambda: network(tokens_BT, positions_BT, (), tokens_BT).backward())

    few, many = seconds(1), seconds(_SEQUENCES)
    rate = (_SEQUENCES - 1) * _LENGTH * each / max(1e-9, many - few)
    return rate, max(1e-7, few - _LENGTH * each / rate) / launch_count(config, _LENGTH)


def _row_seconds() -> tuple[float, float]:
    layout = RecordLayout.of(_COLUMNS, TableOptimizerConfig())
    updater = RowUpdater(TableOptimizerConfig(untouched_rows="lazy"), layout)
    records, slots = torch.zeros(2 * _ROWS, layout.words), torch.randperm(2 * _ROWS)[:_ROWS].sort().values
    gradient = torch.ones(_ROWS, _COLUMNS)
    reading = _best(lambda: updater.read(records, slots).tensor())

    def both() -> None:
        updater.read(records, slots).tensor()
        updater.update_at(records, slots, gradient, 1e-3)

    return reading / _ROWS, max(0.0, _best(both) - reading) / _ROWS


def _decide_seconds() -> float:
    """Of admitting, evicting and finishing, for each row of a step half of whose rows are new."""
    drawn = np.random.default_rng(0)
    steps = [np.sort(drawn.choice(8 * _ROWS, _ROWS, replace=False)) for _ in range(_ROUNDS + 3)]
    directory = open_directory(8 * _ROWS, 3 * _ROWS)
    times = []
    for step, rows in enumerate(steps):
        started = time.perf_counter()
        directory.written(directory.evict(max(0, directory.keep(step, rows) - directory.num_free)))
        admission = directory.admit(step, rows)
        assert admission is not None
        directory.fetched(admission[1])
        directory.finish(step, directory.slots(rows))
        times.append(time.perf_counter() - started)
    return min(times[3:]) / _ROWS


def _exchange_rate(rendezvous: str) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_exchange, args=(rank, rendezvous, results), daemon=True) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if results.empty():
        raise RuntimeError("two ranks could not exchange over gloo")
    return _EXCHANGED / float(results.get())


def _exchange(rank: int, rendezvous: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    sent = torch.zeros(2 * _EXCHANGED // 4)
    received = torch.empty_like(sent)
    seconds = _best(lambda: dist.all_to_all_single(received, sent))
    if rank == 0:
        results.put(seconds)
    dist.barrier()
    dist.destroy_process_group()
