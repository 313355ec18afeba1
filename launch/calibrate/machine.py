"""Measures this machine's numbers, as hardware.yaml has them for GPUs: a CPU's, whose ranks share its cores.

What a GPU's bus would be is here a copy of records in memory, unless the job emulates a link (`offload.emulate_link`).
A rank computes on one core. Each number is the median of some rounds, as a run's steps are reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch

from launch.calibrate.disk import disk_rate
from launch.calibrate.memory import memory_kept
from launch.calibrate.network import ROUNDS, WIDTHS, Network, typical
from launch.calibrate.ranks import exchange_rates, rate_with_all_busy
from offload.config import TableOptimizerConfig
from offload.host.cores import usable_cores
from offload.rows.records import RecordLayout
from offload.rows.updater import RowUpdater
from offload.window.open import open_directory
from train.progress import Progress

_COLUMNS, _ROWS = 80, 1 << 15


def calibrated(progress: Progress, rendezvous: str, *, environment: Mapping[str, str], disk: str) -> dict[str, Any]:
    """A catalogue with one machine, `here`, and one network, `loopback`; about two minutes.

    Args:
        progress: shows what is measured.
        rendezvous: a path that does not exist, at which two ranks meet.
        environment: of the only rank of a job.
        disk: a folder on the disk that tables in a file would be on.

    Raises:
        UserError: the folder cannot be written to, or has too little space.
    """
    measures: dict[str, Callable[[], Any]] = {
        "small networks": _model_numbers,
        "all cores at once": lambda: rate_with_all_busy(f"{rendezvous}-busy"),
        "memory": lambda: (_copy_rate(), _record_rate()),
        "the disk": lambda: disk_rate(RecordLayout.of(_COLUMNS, TableOptimizerConfig()).words, disk),
        "rows": _row_seconds,
        "slots": _decide_seconds,
        "two ranks' exchange": lambda: exchange_rates(rendezvous),
        "memory that is kept": lambda: [memory_kept(environment, micro_batches) for micro_batches in (1, 2)],
    }
    progress.expect(len(measures))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    try:
        for number, (what, measure) in enumerate(measures.items()):
            progress.show(number, f"measuring {what}", at_once=True)
            found.append(measure())
    finally:
        torch.set_num_threads(before)
    return _catalogue(*found)


def _catalogue(
    network: tuple[float, float, float],
    busy: float,
    memory: tuple[float, float],
    in_file: float,
    rows: tuple[float, float],
    decide: float,
    exchange: tuple[float, float],
    kept: Sequence[dict[str, float]],
) -> dict[str, Any]:
    """What was measured, in the order of measuring, by the names of hardware.yaml."""
    (flops, half, launch), (copied, records), (read, update), (exchanged, gathered) = network, memory, rows, exchange
    carried = ("copy_engine_bytes_per_second", "fetch_bytes_per_second", "write_back_bytes_per_second")
    here = {
        "device": {
            "overlaps_launches": False,
            "flops_per_second": flops,
            "columns_at_half_rate": half,
            "rate_with_all_busy": busy,
            "memory_bytes": float(psutil.virtual_memory().total),
            "memory_bytes_per_second": copied,
            "kept": kept[0],
            "kept_adding": kept[1],
            "exchange_bytes_per_second": exchanged,
            "gather_bytes_per_second": gathered,
        },
        "link": dict.fromkeys(carried, records) | {"both_directions": 1.0, "lost_to_copies": 0.0},
        "host": {"launch_seconds": launch, "decide_seconds": decide},
        "rows": {"read_seconds": read, "update_seconds": update, "draw_seconds": 4 * _COLUMNS / copied},
        "backbone": {"optimizer_bytes": 30.0, "optimizer_launches": 200},
        "node": {
            "memory_bytes": float(psutil.virtual_memory().total),
            "dram_bytes_per_second": copied,
            "cores": usable_cores(),
            "disk_records_per_second": in_file,
        },
    }
    loopback = {"bytes_per_second": exchanged, "ports": "node", "latency_seconds": 1e-4}
    return {"gpus": {"here": here}, "networks": {"loopback": loopback}}


def _copy_rate() -> float:
    source = torch.zeros(1 << 24)
    target = torch.empty_like(source)
    return 2 * source.nbytes / typical(lambda: target.copy_(source))


def _record_rate() -> float:
    layout = RecordLayout.of(_COLUMNS, TableOptimizerConfig())
    records = torch.zeros(4 * _ROWS, layout.words)
    rows = torch.randperm(4 * _ROWS)[:_ROWS].sort().values
    taken = torch.empty(_ROWS, layout.words)
    return taken.nbytes / typical(lambda: torch.index_select(records, 0, rows, out=taken))


def _model_numbers() -> tuple[float, float, float]:
    """Operations per second of wide networks, the columns with which half of it is reached, and seconds of Python and
    PyTorch for each launch. From forward and backward over few tokens and over many, of networks of two widths: the
    rate is that of their products with everything between them, not of products alone."""
    narrow, wide = (Network(width) for width in WIDTHS)
    # An operation takes (1 + half / columns) / rate.
    slope = max(0.0, narrow.seconds_each - wide.seconds_each) / (1 / narrow.columns - 1 / wide.columns)
    rest = max(0.1 * wide.seconds_each, wide.seconds_each - slope / wide.columns)
    return 1 / rest, slope / rest, narrow.launch_seconds


def _row_seconds() -> tuple[float, float]:
    layout = RecordLayout.of(_COLUMNS, TableOptimizerConfig())
    updater = RowUpdater(TableOptimizerConfig(untouched_rows="lazy"), layout)
    records, slots = torch.zeros(2 * _ROWS, layout.words), torch.randperm(2 * _ROWS)[:_ROWS].sort().values
    gradient = torch.ones(_ROWS, _COLUMNS)
    reading = typical(lambda: updater.read(records, slots).weights.tensor())

    def both() -> None:
        read = updater.read(records, slots)
        read.weights.tensor()
        updater.update_at(read, gradient, 1e-3)

    return reading / _ROWS, max(0.0, typical(both) - reading) / _ROWS


def _decide_seconds() -> float:
    """Of admitting, evicting and finishing, for each row of a step half of whose rows are new."""
    drawn = np.random.default_rng(0)
    steps = [np.sort(drawn.choice(8 * _ROWS, _ROWS, replace=False)) for _ in range(ROUNDS + 3)]
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
    return statistics.median(times[3:]) / _ROWS
