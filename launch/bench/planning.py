"""Part `planning`: the cost of planning a step, beside the cost of the step."""

import time

import torch
from torch import Tensor

from launch.bench.devices import open_device
from launch.bench.measure import Spread, race, wait_until_idle
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from launch.bench.table_path import TablePath
from launch.bench.workload import Workload
from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from offload.device.workers import background_worker
from train.progress import Progress

_LIMIT = 0.15
_VOCABULARY = 129_280


def measure_planning(options: BenchOptions, progress: Progress) -> Section:
    """Times a step's planning on its own, and steps whose plans are ready beside steps with planning in the background.

    Raises:
        Unavailable: host memory does not suffice.
    """
    drawn = options.draw()
    gradient_ND = drawn.workload.gradient()
    config = options.offload(drawn)
    device = open_device(options.device)
    ready = TablePath("ready", drawn, config, gradient_ND, device=device)
    ahead = TablePath("ahead", drawn, config, gradient_ND, device=device)
    try:
        addresses_ms = _time_addresses(drawn.workload, options, config.planner_threads)
        alone_ms = [_time_plan(ready, step) for step in range(drawn.steps)]
        ready.tables.take_traffic()
        times_ready, times_ahead = race([ready, ahead], steps=options.steps, warmup=options.warmup, progress=progress)
    finally:
        ready.close()
        ahead.close()
    path = Spread.of(times_ready.step_ms).median
    timed = slice(options.warmup, None)
    busy_ms = [1e3 * traffic.planned_s for traffic in ahead.traffic[timed]]
    alone, addresses = Spread.of(alone_ms[timed]), Spread.of(addresses_ms[timed])

    def row(what: str, spread: Spread) -> dict[str, Cell]:
        return {"what": what, "ms": spread, "share_of_the_step": spread.median / path}

    return Section(
        f"Planning a step ({options.optimizer}, depth {options.depth})",
        [
            row("step, its plan ready", Spread.of(times_ready.step_ms)),
            row("step, a later step being planned beside it", Spread.of(times_ahead.step_ms)),
            row("plan, nothing beside it", alone),
            row("addresses of the step's tokens: compress, hash", addresses),
            row("planner's thread busy, beside the step", Spread.of(busy_ms)),
        ],
        [Measure("plan and addresses, share of the step", (alone.median + addresses.median) / path, _LIMIT)],
        [
            f"{drawn.workload.lookups:,} lookups a step on {options.threads} thread(s), planning on "
            f"{config.planner_threads}; the ids of the step are given, addresses are measured apart",
        ],
    )


def _time_plan(path: TablePath, step: int) -> float:
    wait_until_idle()
    started = time.perf_counter()
    path.tables.check_window(step)
    return 1e3 * (time.perf_counter() - started)


def _time_addresses(workload: Workload, options: BenchOptions, threads: int) -> list[float]:
    """Milliseconds for the real addresses of as many lookups, on a thread like the planner's."""
    book = AddressBook(
        identity_vocabulary(_VOCABULARY, pad_id=0),
        layers=[0],
        orders=[2, 3] if workload.lookups_per_token > 1 else [2],
        heads=max(1, workload.lookups_per_token // 2),
        rows_per_head=max(1, workload.rows // workload.lookups_per_token),
    )
    positions_BT = torch.arange(workload.tokens)[None]
    generator = torch.Generator().manual_seed(workload.seed)

    def timed(tokens_BT: Tensor) -> float:
        started = time.perf_counter()
        book.all_rows(tokens_BT, positions_BT)
        return 1e3 * (time.perf_counter() - started)

    with background_worker("addresses", torch.device("cpu"), threads) as worker:
        tokens = [
            torch.randint(_VOCABULARY, (1, workload.tokens), generator=generator) for _ in range(options.total_steps)
        ]
        return [worker.submit(timed, tokens_BT).result() for tokens_BT in tokens]
