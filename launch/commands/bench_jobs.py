"""`engram bench train`, `trace` and `all`: training jobs, what their traces say, and everything within a given time."""

import json
from typing import Any

import click

from launch.commands import bench_shared as shared
from launch.commands.numbers import Finite, NumberList
from offload.engines import ENGINES

_JOBS = {"cuda": "configs/bench.yaml", "cpu": "configs/tiny.yaml"}
_ALL = ("train", "kernels", "links", "offload")


def _no_files(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses a job where only overrides are expected: other commands take it there."""
    if job := next((word for word in words if "=" not in word), None):
        raise click.UsageError(f"'{job}' is no override SECTION.KEY=VALUE. If it is the job: --job {job}", context)
    return words


_overrides: shared.Decorator = click.argument(
    "overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...", callback=_no_files
)
_traces: shared.Decorator = click.option(
    "--traces",
    type=click.Path(file_okay=False),
    metavar="FOLDER",
    help="Also write traces of some steps of each run there.",
)


@click.command(
    short_help="Time training steps, rows in host memory or resident.",
    epilog="""\b
Examples:
  engram bench train
  engram bench train --job configs/tiny.yaml --steps 10 --rounds 2 --json
  engram bench train --engine zero_copy --engine staged --depths 2,0 --traces traces offload.window_rows=1000000
""",
)
@_overrides
@shared.device
@click.option(
    "--job", metavar="FILE", help="The job; default: configs/bench.yaml on a GPU, configs/tiny.yaml on a CPU."
)
@click.option("--steps", type=click.IntRange(min=1), default=12, show_default=True, help="Timed steps per turn.")
@click.option(
    "--warmup", type=click.IntRange(min=1), default=4, show_default=True, help="Steps before those, not timed."
)
@click.option("--depths", type=NumberList(0, 64), default=(2, 1, 4, 0), help="Look-aheads to try; default: 2,1,4,0.")
@click.option(
    "--engine", "engines", type=click.Choice(["auto", *ENGINES, "cpu"]), multiple=True, default=("auto",),
    show_default=True, help="Transfer engine; repeat it for a run with each.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Turns per look-ahead.")
@click.option("--partial", type=click.Path(dir_okay=False), help="File for the JSON object, rewritten after each turn.")
@_traces
@shared.seconds
@shared.threads
@shared.json
def train(overrides: tuple[str, ...], job: str | None, **chosen: Any) -> None:
    """Time a job's training step with rows in host memory against all rows resident.

    Trains the same run several times, in one process per rank, in turns of some steps: with all rows resident, and in
    host memory with each engine, at one look-ahead after another. Losses and gradient norms are compared bit by bit.
    Also reports tokens per second, and model FLOPs utilisation relative to a large matrix product. With --traces also
    what the GPU did in two steps: rows moved during the computation, gaps, waits, the longest kernels.
    """
    from train.config.file import load
    from train.config.job import JobConfig

    load(job or _JOBS["cpu"], overrides, JobConfig)  # before what takes seconds to import

    from launch.bench.devices import chosen_device

    job = job or _JOBS[chosen_device(chosen["device"])]
    shared.measure(("train",), job=job, overrides=overrides, **chosen)


@click.command(
    epilog="""\b
Examples:
  engram bench trace runs/mine/trace.json.gz
"""
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--steps", type=click.IntRange(min=1), help="Steps in each FILE; default: as recorded in it.")
@shared.json
def trace(files: tuple[str, ...], steps: int | None, as_json: bool) -> None:
    """Summarise traces of training steps (`train.profile`).

    Shows how much of the rows' travel the computation hides, when the GPU was idle, how often the host waited, and
    which kernels took longest.
    """
    from pathlib import Path

    from launch.bench.options import BenchOptions
    from launch.bench.trace.report import trace_sections

    shared.tell(
        trace_sections([Path(file) for file in files], steps), BenchOptions(threads=shared.thread_count(None)), as_json
    )


@click.command(
    short_help="Run the parts train, kernels, links and offload in turn.",
    name="all",
    epilog="""\b
Examples:
  engram bench all
  engram bench all --minutes 8 --json figures.json
""",
)
@shared.device
@click.option(
    "--minutes", type=Finite(min=0), default=8.0, show_default=True, help="Time limit for all parts together."
)
@click.option("--part", "parts", multiple=True, type=click.Choice(_ALL), help="Only this part; may be repeated.")
@click.option("--job", metavar="FILE", help="The job of part `train`.")
@_traces
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Also write all results there."
)
@_overrides
def everything(
    device: shared.Device,
    minutes: float,
    parts: tuple[str, ...],
    job: str | None,
    traces: str | None,
    json_file: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Run train, kernels, links and offload within a given time, smaller on a CPU.

    A part that cannot run here, or not in time, is named with the reason; the others' figures are shown all the same,
    and written to FILE as soon as a part has ended. Overrides are for the job of `engram bench train`.
    """
    from pathlib import Path

    from launch.bench.devices import chosen_device
    from launch.bench.everything import Outcome, run_everything, sections_of, summary, to_json
    from train.hardware import describe_machine

    on, console = chosen_device(device), shared.console()
    machine = describe_machine(shared.thread_count(None))

    def keep(outcomes: dict[str, Outcome]) -> None:
        if json_file is not None:
            figures = json.dumps(to_json(outcomes, machine, minutes, on), indent=2)
            Path(json_file).write_text(figures + "\n", encoding="utf-8")

    keep({})  # a mistake in the file's name is reported now
    chosen = [*(("--job", job) if job else ()), *(("--traces", traces) if traces else ()), *overrides]
    outcomes = run_everything(minutes, on, {"train": tuple(chosen)}, parts, keep)
    for outcome in outcomes.values():
        for section in sections_of(outcome).values():
            section.show(console)
    summary(outcomes).show(console)
