"""A training step with its rows in host memory beside one with all rows resident: several runs, one process, in turns.

All runs have the same seed, so they are the same run, and must have the same bits. A turn trains some steps of one run
and then the same steps of the others, the windows' runs at one look-ahead after the other: windows stay warm, nothing
is built again, and what is compared has the same tokens, a minute apart at most.

    python -m launch.bench.side_by_side configs/bench.yaml --seconds 200 --json turns.json --traces traces
"""

import gc
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from launch.bench.deadline import Deadline
from launch.bench.measure import Spread
from launch.bench.report import Cell, Measure, Section
from launch.local.environment import meeting_port, rank_environment, visible_gpus

_LIMIT = 1.005
_TRACED_STEPS = 2
_WARMUP_TURNS = 1  # of each run: kernels are compiled, the allocator and the window grow to their sizes


@dataclass
class Turn:
    """Some steps of one run.

    Attributes:
        lane: its name: the engine that carries its rows, or "resident".
        depth: the window's look-ahead; None for the resident run.
        step_ms: mean over the timed steps, from the GPU's end of the one before to its end of the last.
        stall_ms: a step, that the loop waited for plans and rows.
        fetched, written_back: rows a step.
        phases_ms: a step, what the host spent in parts of the loop; their waits for the GPU included.
    """

    lane: str
    depth: int | None
    step_ms: float
    stall_ms: float
    fetched: float
    written_back: float
    phases_ms: dict[str, float]


@dataclass
class Lane:
    """A run that is trained in turns.

    Attributes:
        name: the engine that carries its rows, or "resident".
        run, trainer: of the job.
        results: loss and gradient norm of every step so far, with all their bits.
    """

    name: str
    run: Any
    trainer: Any
    results: list[tuple[float, float]] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def train(self, steps: range, untimed: int, depth: int | None) -> Turn:
        """Trains `steps`; the first `untimed` of them do not count."""
        import torch

        if depth is not None:
            self.run.tables.look_ahead(depth)
        losses = []
        for step in steps:
            if step == steps.start + untimed:
                _finish_work()
                self.phases.clear()
                self.run.tables.take_traffic()
                started = time.perf_counter()
            result = self.trainer.train_step(step)
            losses.append((result.loss, result.grad_norm))
        _finish_work()
        count = len(steps) - untimed
        taken = time.perf_counter() - started
        traffic = self.run.tables.take_traffic()
        values = torch.stack([loss for loss, _ in losses]).tolist()
        self.results += [(loss, norm) for loss, (_, norm) in zip(values, losses, strict=True)]
        each = 1e3 / count
        phases = {name: each * seconds for name, seconds in self.phases.items()}
        moved = traffic.fetched / count, traffic.written_back / count
        return Turn(self.name, depth, each * taken, each * traffic.waited_s, *moved, phases)

    def watch(self) -> None:
        """Counts the host's time in the parts of the loop."""
        tables, engine = self.run.tables, self.run.engine
        begin = _timed(tables.begin, "begin", self.phases)

        def begin_watched(number: int) -> Any:
            step = begin(number)
            for name in ("reduce", "apply"):
                setattr(step, name, _timed(getattr(step, name), name, self.phases))
            return step

        tables.begin = begin_watched
        for name in ("gradient_norm_squared", "step"):
            setattr(engine, name, _timed(getattr(engine, name), name, self.phases))


def _timed(function: Callable[..., Any], name: str, phases: dict[str, float]) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            phases[name] += time.perf_counter() - started

    return timed


def _finish_work() -> None:
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def open_lane(job_file: str, folder: str, name: str, steps: int, overrides: Sequence[str], **settings: object) -> Lane:
    """Builds a run of the job, in a folder of its own, from its first step."""
    from train.config.file import load
    from train.config.job import JobConfig
    from train.report.reporter import Reporter
    from train.run import Run
    from train.trainer import Trainer

    values = {
        "run.dir": folder,
        "run.name": name,
        "train.steps": steps,
        "eval.every": steps,
        "checkpoint.every": "null",
        "wandb.mode": "disabled",
    } | {key.replace("__", "."): value for key, value in settings.items()}
    job = load(job_file, [*overrides, *(f"{key}={value}" for key, value in values.items())], JobConfig)
    run = Run(job)
    if run.tables is None:
        raise click.ClickException(f"{job_file}: a model without Engram has no tables to measure")
    run.resume()
    trainer = Trainer(
        job,
        engine=run.engine,
        tables=run.tables,
        train_loader=run.train_loader,
        validation_loader=run.validation_loader,
        checkpoints=run.checkpoints,
        reporter=Reporter(job, run.folder, start=0, active=False),
    )
    lane = Lane(name, run, trainer)
    lane.watch()
    return lane


def trace(lane: Lane, steps: range, path: Path, depth: int | None) -> None:
    """Trains `steps` under PyTorch's profiler, and writes what the GPU did."""
    from train.config.report import ProfileConfig
    from train.report.profile import TRACE_FILE, StepProfiler

    profiler = StepProfiler(ProfileConfig(first=steps.start + 1, steps=len(steps)), path.parent, lane.run.engine.device)
    if depth is not None:
        lane.run.tables.look_ahead(depth)
    results = []
    for step in steps:
        with profiler.step(step + 1):
            results.append(lane.trainer.train_step(step))
    profiler.close()
    lane.results += [(result.loss.item(), result.grad_norm) for result in results]
    (path.parent / TRACE_FILE).replace(path)


def measure(
    lanes: Sequence[Lane],
    depths: Sequence[int],
    *,
    steps: int,
    untimed: int,
    rounds: int,
    deadline: Deadline,
    traces: Path | None,
    so_far: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Trains all runs in turns, until the rounds or the time are over.

    Args:
        lanes: the runs; the first is the resident one.
        depths: of the windows' turns, one after another.
        steps, untimed: of a turn, and how many of its first do not count.
        rounds: of all depths.
        deadline: no turn begins that would not end in time.
        traces: a folder for two steps of each run; None for none.
        so_far: is given what is known after every turn.
    """
    turns: list[list[Turn]] = []
    at, longest = 0, 0.0
    plan = [depths[0]] * _WARMUP_TURNS + list(depths) * rounds
    found: dict[str, Any] = {}
    for number, depth in enumerate(plan):
        if turns and not deadline.allows(1.2 * longest):
            break
        started = time.monotonic()
        turn = range(at, at + steps)
        order = lanes[:: 1 if number % 2 else -1]
        done = {lane.name: lane.train(turn, untimed, None if lane is lanes[0] else depth) for lane in order}
        at, longest = at + steps, time.monotonic() - started
        if number >= _WARMUP_TURNS:
            turns.append([done[lane.name] for lane in lanes])
        if traces is not None and number == _WARMUP_TURNS:
            at = _trace_all(lanes, at, traces, depth)
        found = summary(turns, {lane.name: lane.results for lane in lanes})
        so_far(found)
        _tell(done, found["different"])
    return found


def _trace_all(lanes: Sequence[Lane], at: int, traces: Path, depth: int) -> int:
    traces.mkdir(parents=True, exist_ok=True)
    traced = range(at, at + _TRACED_STEPS)
    for lane in lanes:
        trace(lane, traced, traces / f"{lane.name}.json.gz", None if lane is lanes[0] else depth)
    return traced.stop


def _tell(turns: dict[str, Turn], different: dict[str, int]) -> None:
    told = [
        f"{turn.lane} {'' if turn.depth is None else f'depth {turn.depth} '}{turn.step_ms:.2f} ms"
        + (
            f" (stall {turn.stall_ms:.2f}, {turn.fetched:,.0f} rows in, {turn.written_back:,.0f} out)"
            if turn.fetched
            else ""
        )
        for turn in turns.values()
    ]
    print("; ".join(told), f"; different: {different}" if different else "; bits equal", file=sys.stderr, flush=True)


def summary(turns: list[list[Turn]], results: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """What the turns came to, as a section and, turn by turn, as JSON can hold it."""
    base, *others = results
    different = {
        name: next(at for at, pair in enumerate(zip(results[base], results[name], strict=True)) if pair[0] != pair[1])
        for name in others
        if results[name] != results[base]
    }
    rows: list[dict[str, Cell]] = [_row([(turn[0], turn[0]) for turn in turns], base, None)] if turns else []
    ratios: dict[str, float] = {}
    for place, name in enumerate(others, 1):
        for depth in sorted({turn[place].depth or 0 for turn in turns}):
            pairs = [(turn[0], turn[place]) for turn in turns if turn[place].depth == depth]
            rows.append(_row(pairs, name, depth))
            ratios[f"{name} at depth {depth}"] = Spread.of([one.step_ms / other.step_ms for other, one in pairs]).median
    measures = [Measure("runs whose losses or gradient norms differ from resident", len(different), 0)]
    if ratios:
        best = min(ratios, key=lambda name: ratios[name])
        measures.append(Measure(f"step with {best}, times resident", ratios[best], _LIMIT))
    section = Section(
        "A training step, rows in host memory beside rows resident",
        rows or [{"rows": base, "depth": None, "step_ms": None}],
        measures,
        [f"{len(results[base])} steps of each run; first different step: {different or None}"],
    )
    return {
        "section": section.to_json(),
        "turns": [[vars(turn) for turn in each] for each in turns],
        "different": different,
        "steps": len(results[base]),
    }


def _row(pairs: list[tuple[Turn, Turn]], name: str, depth: int | None) -> dict[str, Cell]:
    """One line of the table, from pairs of turns: the resident run's, and the one beside it."""
    mine = [turn for _, turn in pairs]
    return {
        "rows": name,
        "depth": depth,
        "step_ms": Spread.of([turn.step_ms for turn in mine]),
        "turns": len(mine),
        "times_resident": Spread.of([turn.step_ms / other.step_ms for other, turn in pairs]),
        "ms_more": Spread.of([turn.step_ms - other.step_ms for other, turn in pairs]),
        "stall_ms": Spread.of([turn.stall_ms for turn in mine]),
        "rows_in": _mean([turn.fetched for turn in mine]),
        "rows_out": _mean([turn.written_back for turn in mine]),
    }


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _keep(known: dict[str, Any], answer: str | None) -> None:
    if answer:
        Path(answer).write_text(json.dumps(known), encoding="utf-8")


def _utilisation(lane: Lane, found: dict[str, Any]) -> str:
    """Model FLOPs utilisation of the resident run, beside a product of large matrices on the same device."""
    from launch.bench.clock import clock_of, matmul_rate
    from launch.bench.peak import DTYPES, SECONDS, SIZE
    from model.census import take_census
    from model.flops import flops_per_token

    job, device = lane.run.job, lane.run.engine.device
    tokens = job.train.global_batch_size * job.data.sequence_length
    flops = tokens * flops_per_token(job.model, take_census(job.model), job.data.sequence_length).total
    step_ms = found["section"]["rows"][0]["step_ms"]
    if step_ms is None:
        return "no step was timed"
    kind = device.type
    peak = matmul_rate(device, clock_of(device, SECONDS[kind]), SIZE[kind], DTYPES[job.train.dtype])
    rate = flops / (1e-3 * step_ms["median"])
    return (
        f"{tokens:,} tokens and {flops / 1e12:.3g} TFLOP a step, resident: {rate / 1e12:.3g} TFLOP/s, "
        f"{100 * rate / peak:.1f} % of the {peak / 1e12:.3g} TFLOP/s of a {job.train.dtype} matrix product"
    )


@click.command(context_settings={"show_default": True})
@click.argument("job")
@click.argument("overrides", nargs=-1)
@click.option("--depths", default="2,0,1,4", help="Look-aheads, in the order of their turns.")
@click.option("--engines", default="auto", help="One run with rows in host memory for each.")
@click.option("--steps", default=16, help="Of a turn.")
@click.option("--untimed", default=4, help="First steps of a turn that do not count.")
@click.option("--rounds", default=3, help="Of all depths.")
@click.option("--seconds", default=math.inf, help="After which no turn begins.")
@click.option(
    "--json", "answer", type=click.Path(dir_okay=False), help="File for the figures, written after each turn."
)
@click.option("--traces", type=click.Path(file_okay=False), help="Folder for traces of two steps of each run.")
def main(
    job: str,
    overrides: tuple[str, ...],
    depths: str,
    engines: str,
    steps: int,
    untimed: int,
    rounds: int,
    seconds: float,
    answer: str | None,
    traces: str | None,
) -> None:
    """Trains JOB several times in one process, in turns: all rows resident, and rows in host memory."""
    deadline = Deadline(None if math.isinf(seconds) else seconds)
    os.environ.update(rank_environment(0, 1, meeting_port(None), visible_gpus()))
    from train.ranks import join_ranks

    join_ranks()
    total = steps * (_WARMUP_TURNS + rounds * len(depths.split(","))) + 2 * _TRACED_STEPS
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        started = time.monotonic()
        lanes = [open_lane(job, folder, "resident", total, overrides, offload__mode="resident")]
        for engine in engines.split(","):
            window = {"offload__mode": "window", "offload__engine": engine}
            lanes.append(open_lane(job, folder, engine, total, overrides, **window))
        gc.collect()
        gc.freeze()  # as the trainer does
        print(f"all runs are built after {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        found = measure(
            lanes,
            [int(depth) for depth in depths.split(",")],
            steps=steps,
            untimed=untimed,
            rounds=rounds,
            deadline=deadline,
            traces=Path(traces) if traces else None,
            so_far=lambda known: _keep(known, answer),
        )
    Section.from_json(found["section"]).show(Console(width=140))
    print(_utilisation(lanes[0], found))
    sys.stdout.flush()
    # Not through the interpreter's end: it would wait for threads and groups of runs that nobody needs any more.
    os._exit(0)


if __name__ == "__main__":
    main()
