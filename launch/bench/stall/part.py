"""Part `stall`: how long a step waits for rows by look-ahead, over an emulated link that is slow on purpose."""

import time
from dataclasses import dataclass, replace

import torch.distributed as dist

from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from launch.bench.table_path import TablePath
from launch.bench.workload import DrawnSteps
from offload.config import LinkConfig
from train.errors import UserError
from train.progress import Progress

DEPTHS = (0, 1, 2, 4)
_WANTED_SHARE = 0.4  # of the step, for which depth 0 is to wait
_NEAR = 0.02
_ATTEMPTS = 4
_LIMIT = 0.02  # of the step, for which depth 1 or 2 may wait
_FEW = 0.05  # of a step's rows: a link for fewer would be swamped in the first steps, when many travel
FILLING = 15  # steps until the window is full and as many rows leave it as enter


@dataclass(frozen=True)
class Waits:
    """How long the steps of a run waited, on the rank that waited most; bytes are per step."""

    step_ms: Spread
    stall_ms: Spread
    share: float
    fetched_bytes: float
    fetched_share: float


def measure_stall(options: BenchOptions, progress: Progress) -> Section:
    """Finds the bandwidth at which depth 0 waits 40 % of the step, then measures every depth with it. Collective.

    Raises:
        Unavailable: host memory does not suffice.
        UserError: no row travels.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    options = replace(options, warmup=max(options.warmup, FILLING))
    share = replace(options.workload, lookups=max(1, options.workload.lookups // ranks), rank=rank)
    drawn = options.draw(share)
    free = run_at(drawn, options, 0, None, progress)
    link, synchronous = _calibrate(free, drawn, options, progress)
    waits = {0: synchronous}
    for depth in DEPTHS[1:]:
        waits[depth] = run_at(drawn, options, depth, link, progress)
    rows = [_row(ranks, 0, None, free), *(_row(ranks, depth, link, its) for depth, its in waits.items())]
    best = min(waits[1].share, waits[2].share)
    return Section(
        f"Stall by look-ahead, over an EMULATED link ({options.optimizer})",
        rows,
        [Measure(f"stall at depth 1 or 2, share of the step, {ranks} rank(s)", best, _LIMIT)],
        [
            f"the link is emulated: its bandwidth is chosen so that depth 0 waits about {100 * _WANTED_SHARE:.0f} % "
            f"of the step; model compute is a sleep of {options.compute_ms:g} ms, which takes no core, as on a GPU",
            f"{options.workload.lookups:,} Zipf({options.workload.zipf:g}) lookups a step over all ranks, "
            f"{share.dim}-wide rows; stall: the loop waits for plans and rows, the slowest rank's",
        ],
    )


def _row(ranks: int, depth: int, link: LinkConfig | None, waits: Waits) -> dict[str, Cell]:
    return {
        "ranks": ranks,
        "depth": depth,
        "emulated_link": f"{link.bytes_per_second / 1e6:.3g} MB/s" if link else "none",
        "step_ms": waits.step_ms,
        "stall_ms": waits.stall_ms,
        "stall_percent_of_the_step": 100 * waits.share,
    }


def _calibrate(free: Waits, drawn: DrawnSteps, options: BenchOptions, progress: Progress) -> tuple[LinkConfig, Waits]:
    """The link over which depth 0 stalls as wanted, and that run; `free` is a run without a link."""
    if free.fetched_share < _FEW:
        raise UserError(
            f"part stall: {100 * (1 - free.fetched_share):.0f} % of a step's rows need no fetch, so "
            "hardly any are transferred; raise --rows, or lower --zipf or --window-rows"
        )
    # With f the step's time without the stall, a stall w is the wanted share s of the step if w = f s / (1 - s).
    rest_ms = free.step_ms.median * (1 - free.share)
    wanted_ms = rest_ms * _WANTED_SHARE / (1 - _WANTED_SHARE)
    link_ms = wanted_ms
    for _ in range(_ATTEMPTS):
        link = LinkConfig(bytes_per_second=1e3 * free.fetched_bytes / link_ms)
        waits = run_at(drawn, options, 0, link, progress)
        if abs(waits.share - _WANTED_SHARE) < _NEAR:
            break
        odds = max(waits.share, 1e-3) / max(1e-3, 1 - waits.share)
        link_ms *= _WANTED_SHARE / (1 - _WANTED_SHARE) / odds
    return link, waits


def run_at(drawn: DrawnSteps, options: BenchOptions, depth: int, link: LinkConfig | None, progress: Progress) -> Waits:
    """The waits of a run at a look-ahead, whose model computes for `options.compute_ms`. Collective."""
    config = options.offload(drawn, depth=depth, window_depth=max(DEPTHS), link=link)
    path = TablePath(
        f"depth {depth}", drawn, config, drawn.workload.gradient(), lambda: time.sleep(options.compute_ms / 1e3)
    )
    progress.expect(drawn.steps)
    step_s = []
    try:
        path.train_once()
        for step in range(drawn.steps):
            started = time.perf_counter()
            path.step(step)
            step_s.append(time.perf_counter() - started)
            progress.advance()
    finally:
        path.close()
    timed = slice(options.warmup, None)
    traffic = path.traffic[timed]
    waited_s, step_s = [its.waited_s for its in traffic], step_s[timed]
    fetched = sum(its.fetched for its in traffic)
    mine = Waits(
        Spread.of([1e3 * value for value in step_s]),
        Spread.of([1e3 * value for value in waited_s]),
        sum(waited_s) / sum(step_s),
        fetched * path.tables.record_bytes / len(traffic),
        fetched / max(1, sum(its.requested for its in traffic)),
    )
    return _slowest(mine)


def _slowest(mine: Waits) -> Waits:
    """The waits of the rank with the largest stall; the same on every rank."""
    every = [mine]
    if dist.is_initialized():
        every = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
    return max(every, key=lambda its: its.share)
