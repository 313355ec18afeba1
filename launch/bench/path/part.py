"""Part `path`: a step of our tables beside what people use today, each beside its like."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Literal

import torch
from torch import Tensor

from launch.bench.clock import clock_of, memory_rate
from launch.bench.devices import open_device
from launch.bench.measure import Contender, Spread, Times, race, ratios
from launch.bench.optimizers import OPTIMIZERS
from launch.bench.options import BenchOptions
from launch.bench.path.baselines import BareGather, TorchEmbedding
from launch.bench.path.fbgemm import FbgemmEmbedding, NotInstalled
from launch.bench.path.least_bytes import least_bytes
from launch.bench.report import Cell, Measure, Section
from launch.bench.table_path import TablePath
from launch.bench.workload import DrawnSteps
from offload.host.limits import memory_limits, size_text
from train.progress import Progress

_MODES: tuple[Literal["resident", "window"], ...] = ("resident", "window")
_OF_FBGEMM = {("rowwise-adagrad", "resident"): 0.8, ("adam", "window"): 1.0}
_PROCESSOR_OF_FBGEMM = 1.2
_OF_SPARSE_ADAM = 0.2
_COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes, for the rate of memory


@dataclass(frozen=True)
class _Field:
    """What a race is run on.

    Attributes:
        options, drawn: the steps.
        gradient_ND: what arrives at every lookup.
        device: where the model would compute.
        rate: bytes/s of the device's memory.
    """

    options: BenchOptions
    drawn: DrawnSteps
    gradient_ND: Tensor
    device: torch.device
    rate: float


class _Missing:
    """A contender that cannot run here, and why."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason


def measure_path(options: BenchOptions, progress: Progress) -> Section:
    """Races our tables under one row optimizer after another, on the same ids.

    Raises:
        Unavailable: host memory does not suffice for our tables.
    """
    device, drawn = open_device(options.device), options.draw()
    rate = memory_rate(device, clock_of(device, 0.5), _COPIED[device.type])
    field = _Field(options, drawn, drawn.workload.gradient(), device, rate)
    optimizers = dict.fromkeys(("rowwise-adagrad", "adam", options.optimizer))
    sections = [_race(field, optimizer, progress) for optimizer in optimizers]
    notes = [line for section in sections for line in section.notes]
    return replace(reduce(Section.joined, sections), notes=[*_notes(field), *notes])


def _race(field: _Field, optimizer: str, progress: Progress) -> Section:
    entries = list(_entries(field, optimizer))
    contenders = [entry for entry in entries if not isinstance(entry, _Missing)]
    try:
        times = race(contenders, steps=field.options.steps, warmup=field.options.warmup, progress=progress)
        timed = {each.name: (each, its) for each, its in zip(contenders, times, strict=True)}
        rows = [_row(field, entry, timed) for entry in entries]
        ours = [each for each in contenders if isinstance(each, TablePath)]
        return Section("Table path: lookup, backward, update", rows, _measures(timed, optimizer), _traffic(field, ours))
    finally:
        for contender in contenders:
            contender.close()


def _entries(field: _Field, optimizer: str) -> Iterator[Contender | _Missing]:
    """Ours in both modes; those of a like optimizer, FBGEMM for comparison with all, and the bare gather."""
    drawn, gradient_ND, device = field.drawn, field.gradient_ND, field.device
    for mode in _MODES:
        options = replace(field.options, optimizer=optimizer, mode=mode)
        yield TablePath(_name(optimizer, mode), drawn, options.offload(drawn), gradient_ND, device=device)
    yield _enter(FbgemmEmbedding.name, 1, field, torch.device("cpu"), lambda: FbgemmEmbedding(drawn, gradient_ND))
    if OPTIMIZERS[optimizer]["type"] == "adam":
        # Each takes most of its memory in its first step, when all are entered: the second is asked for both's.
        for name, copies in (("SparseAdam", 4), ("Adam", 4 + 5)):
            make = partial(TorchEmbedding, drawn, gradient_ND, sparse=name == "SparseAdam", device=device)
            yield _enter(name, copies, field, device, make)
    yield _enter("gather alone", 1, field, device, lambda: BareGather(drawn, device))


def _name(optimizer: str, mode: str) -> str:
    return f"engram, {optimizer}, {mode}"


def _enter(
    name: str, copies: int, field: _Field, device: torch.device, make: Callable[[], Contender]
) -> Contender | _Missing:
    workload = field.drawn.workload
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


def _row(field: _Field, entry: Contender | _Missing, timed: dict[str, tuple[Contender, Times]]) -> dict[str, Cell]:
    if isinstance(entry, _Missing):
        return dict.fromkeys(("contender", *_COLUMNS), None) | {"contender": entry.name, "status": entry.reason}
    times = timed[entry.name][1]
    _, theirs = timed.get(FbgemmEmbedding.name, (None, None))
    nbytes = least_bytes(entry, field.drawn, field.options.warmup)
    cells: dict[str, Cell] = {
        "step_ms": Spread.of(times.step_ms),
        "of_fbgemm": ratios(times, theirs) if theirs else None,
        "cpu_ms": Spread.of(times.cpu_ms),
        "cpu_of_fbgemm": _cpu_ratio(times, theirs) if theirs else None,
        "background_ms": statistics.median(times.background_ms),
        "least_mb": nbytes / 1e6,
        "least_ms": 1e3 * nbytes / field.rate,
        "status": "measured",
    }
    return {"contender": entry.name, **cells}


_COLUMNS = (
    "step_ms", "of_fbgemm", "cpu_ms", "cpu_of_fbgemm", "background_ms", "least_mb", "least_ms", "status",
)  # fmt: skip


def _cpu_ratio(times: Times, base: Times) -> float:
    return statistics.median(times.cpu_ms) / statistics.median(base.cpu_ms)


def _measures(timed: dict[str, tuple[Contender, Times]], optimizer: str) -> list[Measure]:
    found = []
    for mode in _MODES:
        name = _name(optimizer, mode)
        _, ours = timed[name]
        for start, limit in (("FBGEMM", _OF_FBGEMM.get((optimizer, mode))), ("nn.Embedding(sparse", _OF_SPARSE_ADAM)):
            for theirs, (_, its) in timed.items():
                if limit is not None and theirs.startswith(start):
                    found.append(Measure(f"step of {name}, as a share of {theirs}", ratios(ours, its).median, limit))
        if (optimizer, mode) in _OF_FBGEMM and FbgemmEmbedding.name in timed:
            its = timed[FbgemmEmbedding.name][1]
            found.append(
                Measure(
                    f"processor time of {name}, as a share of FBGEMM's", _cpu_ratio(ours, its), _PROCESSOR_OF_FBGEMM
                )
            )
    return found


def _notes(field: _Field) -> list[str]:
    options, workload = field.options, field.drawn.workload
    unique = field.drawn.unique_counts[options.warmup :]
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
        f"least: bytes that a step must move, each once, and how long that takes at the {field.rate / 1e9:.1f} GB/s at "
        "which memory was copied here (bytes read and written)",
    ]


def _traffic(field: _Field, ours: list[TablePath]) -> list[str]:
    found = []
    for path in ours:
        traffic: list[Any] = path.traffic[field.options.warmup :]
        requested, fetched = sum(t.requested for t in traffic), sum(t.fetched for t in traffic)
        written = sum(t.written_back for t in traffic)
        planned_ms, waited_ms = (
            Spread.of([1e3 * s for s in times]).median
            for times in ([t.planned_s for t in traffic], [t.waited_s for t in traffic])
        )
        found.append(
            f"{path.name}: {100 * (1 - fetched / max(1, requested)):.1f} % of the unique rows were in the window, "
            f"{fetched // len(traffic):,} fetched and {written // len(traffic):,} written back a step; planner busy "
            f"{planned_ms:.1f} ms, loop waited {waited_ms:.1f} ms a step"
        )
    return found
