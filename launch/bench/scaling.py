"""Part `scaling`: the same ids in a small table and in one with many times its rows."""

from dataclasses import replace

from launch.bench.devices import open_device
from launch.bench.measure import Spread, Times, race, ratios
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from launch.bench.table_path import TablePath
from launch.bench.workload import Workload
from offload.host.limits import memory_limits
from offload.rows.records import RecordLayout
from train.progress import Progress

_GROWTH = 64
_LIMIT = 1.10
_SHARE_OF_MEMORY = 0.8
_LEAVING_OUT = 4  # columns at a time, until the tables fit


def measure_scaling(options: BenchOptions, progress: Progress) -> Section:
    """Times the table path with a quarter of the requested rows beside 64 times that quarter, on the same ids.

    Once with the ids as they are, so that the larger table has rows that nobody looks up; once with the ids spread
    over all of it, so that its rows lie further apart in memory too.

    Raises:
        Unavailable: host memory does not suffice even for rows of one column.
    """
    small = replace(options.workload, rows=max(2, options.workload.rows // 4))
    small = replace(small, dim=_fitting_dim(options, small))
    larger = {
        "as they are": replace(small, tail=small.rows * (_GROWTH - 1)),
        "spread over the table": replace(small, spread=_GROWTH),
    }
    rows: list[dict[str, Cell]] = []
    measures = []
    for ids, large in larger.items():
        before, after = _race(small, large, options, progress)
        rows += [_row(small, ids, before, before), _row(large, ids, after, before)]
        measures.append(Measure(f"step with {_GROWTH} times the rows, ids {ids}", ratios(after, before).median, _LIMIT))
    notes = [f"{small.lookups:,} Zipf({small.zipf:g}) lookups a step of {small.dim}-wide rows; two tables in turns"]
    if small.dim < options.workload.dim:
        notes.append(f"rows are {small.dim} wide, not {options.workload.dim}: so both tables fit into free memory")
    return Section(f"Step by size of the table ({options.optimizer}, depth {options.depth})", rows, measures, notes)


def _race(small: Workload, large: Workload, options: BenchOptions, progress: Progress) -> list[Times]:
    device, gradient_ND = open_device(options.device), small.gradient()
    contenders: list[TablePath] = []
    try:
        for workload in (small, large):
            drawn = options.draw(workload)
            contenders.append(TablePath("", drawn, options.offload(drawn), gradient_ND, device=device))
        return race(contenders, steps=options.steps, warmup=options.warmup, progress=progress)
    finally:
        for contender in contenders:
            contender.close()


def _row(workload: Workload, ids: str, times: Times, base: Times) -> dict[str, Cell]:
    return {
        "rows_of_the_table": workload.table_rows,
        "ids": ids,
        "step_ms": Spread.of(times.step_ms),
        "times_the_small": ratios(times, base),
        "background_ms": Spread.of(times.background_ms).median,
        "cpu_ms": Spread.of(times.cpu_ms).median,
    }


def _fitting_dim(options: BenchOptions, small: Workload) -> int:
    device, free = open_device(options.device), _SHARE_OF_MEMORY * min(limit.free for limit in memory_limits())
    rows = small.rows * (_GROWTH + 1)
    dim = small.dim
    while dim > 1 and rows * RecordLayout.of(dim, options.table_optimizer).stride_bytes(device) > free:
        dim = max(1, dim - _LEAVING_OUT)
    return dim
