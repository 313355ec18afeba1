"""Part `disk`: how long a step waits for rows of a file on a disk, by look-ahead."""

import tempfile
from dataclasses import replace

from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from launch.bench.stall.part import DEPTHS, FILLING, Waits, run_at
from offload.host.cgroup import cgroup_memory
from offload.host.file_records import IN_FLIGHT, SECTORS, file_stride
from offload.host.limits import size_text
from offload.rows.records import RecordLayout
from train.progress import Progress

_LIMIT = 0.05  # of the step, for which depth 4 may wait


def measure_disk_stall(options: BenchOptions, progress: Progress) -> Section:
    """Measures how long a step's reads take, then every look-ahead with a model that computes for as long.

    Raises:
        Unavailable: memory or the disk does not suffice.
    """
    options = replace(
        options,
        mode="window",
        warmup=max(options.warmup, FILLING),
        host_file=options.host_file or tempfile.gettempdir(),
    )
    drawn = options.draw()
    alone = run_at(drawn, replace(options, compute_ms=0.0), 0, None, progress)
    computing = replace(options, compute_ms=alone.stall_ms.median)
    waits = {depth: run_at(drawn, computing, depth, None, progress) for depth in DEPTHS}
    layout = RecordLayout.of(options.workload.dim, options.table_optimizer)
    stride = file_stride(layout.words, SECTORS[0])
    limit = min((group.limit for group in cgroup_memory()), default=None)
    return Section(
        f"Stall by look-ahead, tables in a file on a disk ({options.optimizer})",
        [_row(0, 0.0, alone), *(_row(depth, computing.compute_ms, its) for depth, its in waits.items())],
        [Measure("stall at depth 4, share of the step", waits[4].share, _LIMIT)],
        [
            f"a file of {size_text(stride * options.workload.table_rows)} in {options.host_file}: records of "
            f"{layout.bytes} bytes, {stride} apart; "
            + (f"the control group may take {size_text(limit)} of memory" if limit else "memory is not limited"),
            f"the model's computation is a sleep for as long as a step waits for its reads at depth 0 ("
            f"{computing.compute_ms:.1f} ms, with the write-backs of the step before beside them)",
            f"up to {IN_FLIGHT} reads and as many writes under way at a time",
        ],
    )


def _row(depth: int, compute_ms: float, waits: Waits) -> dict[str, Cell]:
    return {
        "depth": depth,
        "compute_ms": compute_ms,
        "step_ms": waits.step_ms,
        "stall_ms": waits.stall_ms,
        "stall_percent_of_the_step": 100 * waits.share,
        "fetched_mb": waits.fetched_bytes / 1e6,
    }
