"""`engram bench`."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from launch.bench.optimizers import OPTIMIZERS
from launch.commands.number_list import NumberList

if TYPE_CHECKING:
    from rich.console import Console

    from launch.bench.options import BenchOptions
    from launch.bench.report import Section

_PARTS = ("path", "scaling", "planning", "stall")
_WIDTH = 180  # of a table that no terminal shows
_MODES = ("window", "resident")
_JOBS = {"cuda": "configs/bench.yaml", "cpu": "configs/tiny.yaml"}
_DEVICES = ("auto", "cpu", "cuda")
_ENGINES = ("auto", "zero_copy", "staged", "cpu")
_ALL = ("train", "kernels", "links", "offload")


_Device = Literal["auto", "cpu", "cuda"]
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_device: _Decorator = click.option(
    "--device", type=click.Choice(_DEVICES), default="auto", show_default=True, help="auto: the GPU, if there is one."
)
_seconds: _Decorator = click.option(
    "--seconds", type=click.FloatRange(min=0), help="Leave out what does not fit into so much time; default: no limit."
)
_threads: _Decorator = click.option(
    "--threads", type=click.IntRange(min=1), help="PyTorch's threads; default: one a core."
)
_overrides: _Decorator = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
_traces: _Decorator = click.option(
    "--traces", type=click.Path(file_okay=False), metavar="FOLDER", help="Also record some steps of each run there."
)
_json: _Decorator = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


@click.group()
def command() -> None:
    """Measure parts of the machinery on this machine."""


@command.command(
    epilog="""\b
Examples:
  engram bench offload
  engram bench offload --optimizer rowwise-adagrad --lookups 65536 --json
  engram bench offload --part all
"""
)
@_device
@click.option("--part", type=click.Choice([*_PARTS, "all"]), default="path", show_default=True, help="What to measure.")
@click.option("--lookups", type=click.IntRange(min=1), default=262_144, show_default=True, help="Rows read a step.")
@click.option("--rows", type=click.IntRange(min=2), default=4_000_000, show_default=True, help="Rows of the table.")
@click.option("--dim", type=click.IntRange(min=1), default=80, show_default=True, help="Columns of a row.")
@click.option(
    "--zipf", type=click.FloatRange(min=1, min_open=True), default=1.2, show_default=True, help="Exponent of the ids."
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps.")
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Steps before those.")
@click.option("--optimizer", type=click.Choice([*OPTIMIZERS]), default="adam", show_default=True, help="Of our tables.")
@click.option("--mode", type=click.Choice(_MODES), default="window", show_default=True, help="Of our tables.")
@click.option("--depth", type=click.IntRange(0, 64), default=1, show_default=True, help="Look-ahead in steps.")
@click.option("--window-rows", type=click.IntRange(min=1), help="Slots of the window; default: what the depth needs.")
@click.option(
    "--compute-ms", type=click.FloatRange(min=0), default=100.0, show_default=True, help="Stand-in for a model."
)
@click.option("--plain-allocator", is_flag=True, help="Measure with glibc's defaults, not with a CPU rank's settings.")
@_threads
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the ids.")
@_json
def offload(part: str, lookups: int, rows: int, dim: int, zipf: float, seed: int, **chosen: Any) -> None:
    """Time the tables in host memory beside common alternatives, on Zipf-distributed ids.

    \b
    Parts:
      path      lookup, backward and update, beside PyTorch's SparseAdam and Adam and FBGEMM's embedding
      scaling   the same ids in a table of 64 times the rows
      planning  planning a step, beside the step
      stall     waiting for rows by look-ahead, over an emulated link, on one and two ranks
    """
    from launch.bench.workload import Workload

    _measure(_PARTS if part == "all" else (part,), workload=Workload(lookups, rows, dim, zipf, seed), **chosen)


@command.command(
    epilog="""\b
Examples:
  engram bench kernels
  engram bench kernels --tokens 4096 --seconds 60 --json
"""
)
@_device
@click.option("--tokens", type=click.IntRange(min=1), help="Tokens a step; default: 16,384 on a GPU, 1,024 on a CPU.")
@_seconds
@_threads
@_json
def kernels(**chosen: Any) -> None:
    """Time each kernel beside the same in PyTorch's operations, and beside what the hardware allows.

    The hardware's time is the bytes to be moved, divided by the bandwidth of memory or bus as measured in the same run.
    On a CPU it times the functions that run there, at smaller sizes.
    """
    _measure(("kernels",), **chosen)


@command.command(
    epilog="""\b
Examples:
  engram bench links
  engram bench links --memory-mib 65536 --json
  engram bench links --programs 4,8,16 --record-bytes 160,512,964,1024
"""
)
@_device
@click.option(
    "--memory-mib", type=click.IntRange(min=4), help="Host memory reached into; default: 8,192 with a GPU, else 256."
)
@click.option(
    "--programs",
    type=NumberList(1, 1024),
    default=(),
    help="Programs of a kernel, each number in turn; default: 4 to 64. GPU only.",
)
@click.option(
    "--record-bytes",
    type=NumberList(8, 65_536, multiple_of=4),
    default=(),
    help="Sizes of records, multiples of 4; default: 160 to 1,152.",
)
@_seconds
@_threads
@_json
def links(**chosen: Any) -> None:
    """Time what travels between host memory and the GPU: single records by kernels, beside the copy engines.

    Records of 160 to 1,152 bytes, ascending and in random order, by 4 to 64 programs, or as told; each direction
    alone, and both at once. On a CPU it copies from host to host.
    """
    _measure(("links",), **chosen)


@command.command(
    epilog="""\b
Examples:
  engram bench train
  engram bench train --job configs/tiny.yaml --steps 10 --rounds 2 --json
  engram bench train --engine zero_copy --engine staged --depths 2,0 --traces traces offload.window_rows=1000000
"""
)
@_overrides
@_device
@click.option(
    "--job", metavar="FILE", help="The job; default: configs/bench.yaml on a GPU, configs/tiny.yaml on a CPU."
)
@click.option("--steps", type=click.IntRange(min=1), default=12, show_default=True, help="Timed steps of a turn.")
@click.option(
    "--warmup", type=click.IntRange(min=1), default=4, show_default=True, help="Steps of a turn before those."
)
@click.option("--depths", type=NumberList(0, 64), default=(2, 1, 4, 0), help="Look-aheads in turn; default: 2,1,4,0.")
@click.option(
    "--engine", "engines", type=click.Choice(_ENGINES), multiple=True, default=("auto",), show_default=True,
    help="What carries the rows of a run; may be repeated, and each is a run of its own.",
)  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Turns of each look-ahead.")
@click.option("--partial", type=click.Path(dir_okay=False), help="File for the JSON object, written after each turn.")
@_traces
@_seconds
@_threads
@_json
def train(overrides: tuple[str, ...], job: str | None, **chosen: Any) -> None:
    """Time a training job's step with its rows in host memory, beside all rows resident.

    The same run several times, in one process a rank, in turns of some steps: all rows resident, and in host memory by
    each engine, at one look-ahead after another. Losses and gradient norms are compared bit by bit. Also tokens a
    second, and model FLOPs utilisation beside a large product of matrices. With --traces also what the GPU did in two
    steps: rows under the computation, gaps, waits, the longest kernels.
    """
    from train.config.file import load
    from train.config.job import JobConfig

    load(job or _JOBS["cpu"], overrides, JobConfig)  # before what takes seconds to import

    from launch.bench.devices import chosen_device

    job = job or _JOBS[chosen_device(chosen["device"])]
    _measure(("train",), job=job, overrides=overrides, **chosen)


@command.command(
    epilog="""\b
Examples:
  engram bench trace runs/mine/trace.json.gz
"""
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--steps", type=click.IntRange(min=1), help="Steps that each FILE shows; default: what it says itself.")
@_json
def trace(files: tuple[str, ...], steps: int | None, as_json: bool) -> None:
    """Tell what traces of training steps (`train.profile`) show.

    How much of the rows' travel lies under the computation, when the GPU had nothing to do, how often the host waited,
    and which kernels took longest.
    """
    from pathlib import Path

    from launch.bench.options import BenchOptions
    from launch.bench.trace_report import trace_sections

    _tell(trace_sections([Path(file) for file in files], steps), BenchOptions(threads=_thread_count(None)), as_json)


@command.command(
    name="all",
    epilog="""\b
Examples:
  engram bench all
  engram bench all --minutes 8 --json figures.json
""",
)
@_device
@click.option(
    "--minutes", type=click.FloatRange(min=0), default=8.0, show_default=True, help="Time for all parts together."
)
@click.option("--part", "parts", multiple=True, type=click.Choice(_ALL), help="Only this one; may be repeated.")
@click.option("--job", metavar="FILE", help="The job of part `train`.")
@_traces
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False), metavar="FILE", help="Also write everything there."
)
@_overrides
def everything(
    device: _Device,
    minutes: float,
    parts: tuple[str, ...],
    job: str | None,
    traces: str | None,
    json_file: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Run train, kernels, links and offload within a given time, smaller on a CPU.

    A part that cannot run here, or not in time, is named with the reason; the others' figures are there all the same,
    and in FILE as soon as a part has ended. Overrides are for the job of `engram bench train`.
    """
    from pathlib import Path

    from launch.bench.devices import chosen_device
    from launch.bench.everything import Outcome, run_everything, sections_of, summary, to_json
    from launch.bench.machine import describe_machine

    on, console = chosen_device(device), _console()
    machine = describe_machine(_thread_count(None))

    def keep(outcomes: dict[str, Outcome]) -> None:
        if json_file is not None:
            figures = json.dumps(to_json(outcomes, machine, minutes, on), indent=2)
            Path(json_file).write_text(figures + "\n", encoding="utf-8")

    keep({})  # a mistake in the file's name is told now
    chosen = [*(("--job", job) if job else ()), *(("--traces", traces) if traces else ()), *overrides]
    outcomes = run_everything(minutes, on, {"train": tuple(chosen)}, parts, keep)
    for outcome in outcomes.values():
        for section in sections_of(outcome).values():
            section.show(console)
    summary(outcomes).show(console)


def _thread_count(threads: int | None) -> int:
    from train.machine import usable_cores

    return threads or usable_cores()


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH)


def _measure(parts: tuple[str, ...], *, device: _Device, threads: int | None, as_json: bool, **chosen: Any) -> None:
    """Measures the parts, under options by their names in `BenchOptions`, and prints what they found."""
    from launch.bench.devices import chosen_device
    from launch.bench.options import BenchOptions
    from launch.bench.run import run_parts

    options = BenchOptions(device=chosen_device(device), threads=_thread_count(threads), **chosen)
    _tell(run_parts(parts, options), options, as_json)


def _tell(sections: "dict[str, Section]", options: "BenchOptions", as_json: bool) -> None:
    from launch.bench.report import answer

    if as_json:
        click.echo(json.dumps(answer(sections, options), indent=2))
        return
    console = _console()
    for section in sections.values():
        section.show(console)
