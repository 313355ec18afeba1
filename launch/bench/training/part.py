"""Part `train`: a training step with its rows in host memory beside one with all rows resident.

Several runs with the same seed are trained in turn, in one process per rank. They are the same run, and must have the
same bits. A turn trains some steps of one run and then the same steps of the others, at one look-ahead after another:
windows stay warm, nothing is rebuilt, and steps that are compared have the same tokens and are at most a minute apart.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launch.bench.clock import clock_of, matmul_rate
from launch.bench.deadline import Deadline
from launch.bench.devices import open_device
from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.report import Cell, Measure, Section, answer
from launch.bench.training.lane import RESIDENT, Lane, Turn
from model.census import take_census
from model.flops import flops_per_token
from train.config.file import load
from train.config.job import JobConfig
from train.progress import Progress

_LIMIT = {"cuda": 1.005, "cpu": 1.03}
_TRACED_STEPS = 2
# Of each run: kernels are compiled, the allocator and the window grow to their sizes.
_WARMUP_TURNS = 1
_PEAK_SIZE = {"cuda": 8192, "cpu": 1024}
_PEAK_SECONDS = {"cuda": 0.5, "cpu": 1.0}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Scale:
    """What a step computes, and what this rank's device could compute.

    Attributes:
        tokens, flops: of a step, all ranks together.
        peak: operations per second of a large matrix product, all ranks together.
        dtype: of the product.
    """

    tokens: int
    flops: float
    peak: float
    dtype: str


def measure_training(options: BenchOptions, progress: Progress) -> Section:
    """Trains runs of the job `options.job` in turn, on the ranks that have joined. Collective.

    Args:
        options: how to measure; `seconds` counts from now, and what is known after each turn goes to `partial`.
        progress: to report to.

    Raises:
        UserError: the job cannot be trained; in the words of `engram train`.
    """
    deadline, scale = Deadline(options.seconds), _scale(options)
    depths = [options.depths[0]] * _WARMUP_TURNS + [*options.depths] * options.rounds
    each, names = options.total_steps, (RESIDENT, *options.engines)
    progress.expect(each * len(depths) * len(names))
    # Each rank has a folder of its own, as only the first one writes.
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        steps = each * len(depths) + (_TRACED_STEPS if options.traces else 0)
        lanes = [Lane.open(name, steps, options, folder) for name in names]
        gc.collect()
        gc.freeze()  # as the trainer does
        turns: list[list[Turn]] = []
        section = summary(turns, lanes, options, scale)
        for turn in _turns(lanes, depths, options, deadline, progress):
            turns += [turn] if turn else []
            section = summary(turns, lanes, options, scale)
            if options.partial and dist.get_rank() == 0:
                Path(options.partial).write_text(json.dumps(answer({"train": section}, options)), encoding="utf-8")
    return section


def _turns(
    lanes: Sequence[Lane], depths: Sequence[int], options: BenchOptions, deadline: Deadline, progress: Progress
) -> Iterator[list[Turn] | None]:
    """Trains all runs, one look-ahead after another, as long as there is time; None stands for a warm-up turn."""
    at, longest = 0, 0.0
    for number, depth in enumerate(depths):
        if number >= _WARMUP_TURNS + 1 and not _all_allow(deadline, 1.2 * longest, lanes[0].run.engine.device):
            return
        started, done = time.monotonic(), {}
        for lane in lanes[:: 1 if number % 2 else -1]:
            done[lane.name] = lane.train(range(at, at + options.total_steps), options.warmup, depth)
            progress.advance(options.total_steps)
        at, longest = at + options.total_steps, time.monotonic() - started
        progress.line("; ".join(map(str, done.values())))
        if options.traces and number == _WARMUP_TURNS:
            folder = Path(options.traces)
            folder.mkdir(parents=True, exist_ok=True)
            for lane in lanes:
                lane.trace(range(at, at + _TRACED_STEPS), folder if dist.get_rank() == 0 else None, depth)
            at += _TRACED_STEPS
        yield [done[lane.name] for lane in lanes] if number >= _WARMUP_TURNS else None


def _all_allow(deadline: Deadline, seconds: float, device: torch.device) -> bool:
    """The first rank decides: clocks differ, and a turn needs all ranks."""
    allowed = torch.tensor([int(deadline.allows(seconds))], device=device)
    dist.broadcast(allowed, src=0)
    return bool(allowed)


def summary(turns: Sequence[Sequence[Turn]], lanes: Sequence[Lane], options: BenchOptions, scale: Scale) -> Section:
    """The results of the turns.

    Args:
        turns: each has one of every run, in the order of `lanes`.
        lanes: the resident run, then the others.
        options: how it was measured.
        scale: of a step.
    """
    base, *others = lanes
    pairs = {(base.name, None): [(turn[0], turn[0]) for turn in turns]} | {
        (lane.name, depth): [(turn[0], turn[place]) for turn in turns if turn[place].depth == depth]
        for place, lane in enumerate(others, 1)
        for depth in sorted(options.depths)
    }
    different = {lane.name: at for lane in others if (at := _first_difference(base, lane)) is not None}
    measures = [Measure("runs whose losses or gradient norms differ from resident", len(different), 0)]
    measured = {setting: its for setting, its in pairs.items() if its and setting[1] is not None}
    if measured:
        best = min(measured, key=lambda setting: _ratios(measured[setting]).median)
        what = f"step with {best[0]} at depth {best[1]}, times resident"
        measures.append(Measure(what, _ratios(measured[best]).median, _LIMIT[options.device]))
    notes = [
        f"{len(base.results)} steps of each run; first different step: {different or None}",
        f"a turn: {options.warmup} steps not counted, and {options.steps} counted; ratios compare turn by turn",
        f"{scale.tokens:,} tokens and {scale.flops / 1e12:.3g} TFLOP a step: 6 a multiplied parameter and token, and "
        f"the attention's products; utilisation is of the {scale.peak / 1e12:.3g} TFLOP/s of a {scale.dtype} product "
        "of square matrices",
        *(f"host, ms a step: {_phases(setting, its)}" for setting, its in pairs.items() if its),
    ]
    rows = [_row(setting, its, scale) for setting, its in pairs.items()]
    return Section(f"{options.job}: a training step, rows in host memory beside rows resident", rows, measures, notes)


def _first_difference(base: Lane, other: Lane) -> int | None:
    """The first step with another loss or gradient norm, from 1."""
    steps = enumerate(zip(base.results, other.results, strict=True), 1)
    return next((step for step, (mine, theirs) in steps if mine != theirs), None)


def _row(setting: tuple[str, int | None], pairs: list[tuple[Turn, Turn]], scale: Scale) -> dict[str, Cell]:
    """One line of the table, from pairs of turns: the resident run's, and the one beside it."""
    mine = [turn for _, turn in pairs]
    step = Spread.of([turn.step_ms for turn in mine]) if mine else None
    return {
        "rows": setting[0],
        "depth": setting[1],
        "turns": len(mine),
        "step_ms": step,
        "times_resident": _ratios(pairs) if mine else None,
        "ms_more": Spread.of([turn.step_ms - other.step_ms for other, turn in pairs]) if mine else None,
        "stall_ms": Spread.of([turn.stall_ms for turn in mine]) if mine else None,
        "rows_in": statistics.fmean(turn.fetched for turn in mine) if mine else None,
        "rows_out": statistics.fmean(turn.written_back for turn in mine) if mine else None,
        "tokens_per_s": scale.tokens / (1e-3 * step.median) if step else None,
        "model_FLOPs_utilisation_percent": 100 * scale.flops / (1e-3 * step.median) / scale.peak if step else None,
    }


def _ratios(pairs: list[tuple[Turn, Turn]]) -> Spread:
    return Spread.of([turn.step_ms / other.step_ms for other, turn in pairs])


def _phases(setting: tuple[str, int | None], pairs: list[tuple[Turn, Turn]]) -> str:
    turns = [turn.phases_ms for _, turn in pairs]
    told = [f"{name} {statistics.median(turn[name] for turn in turns):.1f}" for name in turns[0]]
    return f"{setting[0]}{'' if setting[1] is None else f' at depth {setting[1]}'}: {', '.join(told)}"


def _scale(options: BenchOptions) -> Scale:
    job, device = load(options.job, options.overrides, JobConfig), open_device(options.device)
    tokens = job.train.global_batch_size * job.data.sequence_length
    flops = tokens * flops_per_token(job.model, take_census(job.model), job.data.sequence_length).total
    clock = clock_of(device, _PEAK_SECONDS[device.type])
    rate = matmul_rate(device, clock, _PEAK_SIZE[device.type], _DTYPES[job.train.dtype])
    return Scale(tokens, flops, rate * dist.get_world_size(), job.train.dtype)
