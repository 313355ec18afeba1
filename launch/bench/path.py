"""Part `path`: a step of our tables beside what people use today."""

from collections.abc import Callable

import torch

from launch.bench.baselines import BareGather, TorchEmbedding
from launch.bench.devices import open_device
from launch.bench.fbgemm import FbgemmEmbedding, NotInstalled
from launch.bench.measure import Contender, Spread, Times, race, ratios
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section
from launch.bench.table_path import TablePath
from offload.host.limits import memory_limits, size_text
from train.progress import Progress

_OF_FBGEMM, _OF_SPARSE_ADAM = 0.7, 0.2


class _Missing:
    """A contender that cannot run here, and why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason


def measure_path(options: BenchOptions, progress: Progress) -> Section:
    """Times the steps of all contenders on the same ids, in turn.

    Raises:
        ValueError: host memory does not suffice for our tables.
    """
    device, drawn = open_device(options.device), options.draw()
    gradient_ND = drawn.workload.gradient()
    ours = TablePath("engram", drawn, options.offload(drawn), gradient_ND, device=device)
    cpu = torch.device("cpu")
    entries: list[Contender | _Missing] = [
        ours,
        _enter("FBGEMM on CPU, row-wise Adagrad", 1, options, cpu, lambda: FbgemmEmbedding(drawn, gradient_ND)),
        _enter(
            "SparseAdam", 4, options, device, lambda: TorchEmbedding(drawn, gradient_ND, sparse=True, device=device)
        ),
        _enter("Adam", 5, options, device, lambda: TorchEmbedding(drawn, gradient_ND, sparse=False, device=device)),
        _enter("gather alone", 1, options, device, lambda: BareGather(drawn, device)),
    ]
    contenders = [entry for entry in entries if not isinstance(entry, _Missing)]
    try:
        times = race(contenders, steps=options.steps, warmup=options.warmup, progress=progress)
    finally:
        for contender in contenders:
            contender.close()
    by_name = {contender.name: its for contender, its in zip(contenders, times, strict=True)}
    missing = {entry.name: entry.reason for entry in entries if isinstance(entry, _Missing)}
    rows = [_row(entry.name, by_name.get(entry.name), by_name["engram"], missing) for entry in entries]
    return Section(
        f"Table path: lookup, backward, update ({options.optimizer}, {options.mode}, depth {options.depth})",
        rows,
        _measures(by_name),
        _notes(options, drawn.unique_counts[options.warmup :], ours),
    )


def _enter(
    name: str, copies: int, options: BenchOptions, device: torch.device, make: Callable[[], Contender]
) -> Contender | _Missing:
    workload = options.workload
    needed = copies * workload.table_rows * workload.dim * 4
    free = _free_memory(device)
    if needed > free:
        return _Missing(name, f"needs {size_text(needed)} of memory, {size_text(free)} are free")
    try:
        return make()
    except NotInstalled as error:
        return _Missing(name, str(error))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(limit.free for limit in memory_limits())


def _row(name: str, times: Times | None, ours: Times, missing: dict[str, str]) -> dict[str, Cell]:
    if times is None:
        return dict.fromkeys(("contender", *_COLUMNS), None) | {"contender": name, "status": missing[name]}
    return {
        "contender": name,
        "step_ms": Spread.of(times.step_ms),
        "times_ours": ratios(times, ours),
        "background_ms": Spread.of(times.background_ms).median,
        "cpu_ms": Spread.of(times.cpu_ms).median,
        "status": "measured",
    }


_COLUMNS = ("step_ms", "times_ours", "background_ms", "cpu_ms", "status")


def _measures(times: dict[str, Times]) -> list[Measure]:
    found = []
    for start, limit, label in (
        ("FBGEMM", _OF_FBGEMM, "our step as a share of FBGEMM's"),
        ("nn.Embedding(sparse=True)", _OF_SPARSE_ADAM, "our step as a share of SparseAdam's"),
    ):
        for name, theirs in times.items():
            if name.startswith(start):
                found.append(Measure(label, ratios(times["engram"], theirs).median, limit))
    return found


def _notes(options: BenchOptions, unique: list[int], ours: TablePath) -> list[str]:
    workload = options.workload
    traffic = ours.traffic[options.warmup :]
    requested, fetched = sum(t.requested for t in traffic), sum(t.fetched for t in traffic)
    written = sum(t.written_back for t in traffic)
    planned_ms = Spread.of([1e3 * t.planned_s for t in traffic]).median
    waited_ms = Spread.of([1e3 * t.waited_s for t in traffic]).median
    return [
        f"{workload.lookups:,} Zipf({workload.zipf:g}) lookups a step of {workload.dim}-wide fp32 rows in a table of "
        f"{workload.table_rows:,}; {100 * sum(unique) / len(unique) / workload.lookups:.1f} % unique",
        *(
            ["tables in GPU memory but for engram's and FBGEMM's; each step is timed until the GPU has done it"]
            if options.device == "cuda"
            else []
        ),
        f"median of {options.steps} steps (10th to 90th percentile), {options.threads} thread(s), in turns on the same "
        "ids; ratios compare round by round",
        "the C library gives freed memory back, as it does by default"
        if options.plain_allocator
        else "the C library keeps freed memory, as `engram train` tells it to on CPU ranks, for all contenders",
        "background: other threads still at work after a step returned; cpu: all threads, background included",
        f"engram: {100 * (1 - fetched / max(1, requested)):.1f} % of the unique rows were in the window, "
        f"{fetched // len(traffic):,} fetched and {written // len(traffic):,} written back a step; planner busy "
        f"{planned_ms:.1f} ms, loop waited {waited_ms:.1f} ms a step",
    ]
