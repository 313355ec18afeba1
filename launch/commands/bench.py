"""`engram bench`."""

import json
from typing import Literal

import click

_PARTS = ("path", "scaling", "planning", "stall", "job")
_WIDTH = 140  # of a table that no terminal shows
_MODES = ("window", "resident")
_OPTIMIZERS = ("adam", "adam-lazy", "rowwise-adagrad", "rowwise-rmsprop")


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
@click.option("--part", type=click.Choice([*_PARTS, "all"]), default="path", show_default=True, help="What to measure.")
@click.option("--lookups", type=click.IntRange(min=1), default=262_144, show_default=True, help="Rows read a step.")
@click.option("--rows", type=click.IntRange(min=2), default=4_000_000, show_default=True, help="Rows of the table.")
@click.option("--dim", type=click.IntRange(min=1), default=80, show_default=True, help="Columns of a row.")
@click.option(
    "--zipf", type=click.FloatRange(min=1, min_open=True), default=1.2, show_default=True, help="Exponent of the ids."
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed steps.")
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Steps before those.")
@click.option("--optimizer", type=click.Choice(_OPTIMIZERS), default="adam", show_default=True, help="Of our tables.")
@click.option("--mode", type=click.Choice(_MODES), default="window", show_default=True, help="Of our tables.")
@click.option("--depth", type=click.IntRange(0, 64), default=1, show_default=True, help="Look-ahead in steps.")
@click.option("--window-rows", type=click.IntRange(min=1), help="Slots of the window; default: what the depth needs.")
@click.option(
    "--compute-ms", type=click.FloatRange(min=0), default=100.0, show_default=True, help="Stand-in for a model."
)
@click.option("--job", default="configs/tiny.yaml", show_default=True, metavar="FILE", help="Trained by part `job`.")
@click.option("--runs", type=click.IntRange(min=1), default=2, show_default=True, help="Of that job, in each mode.")
@click.option("--plain-allocator", is_flag=True, help="Measure with glibc's defaults, not with a CPU rank's settings.")
@click.option("--threads", type=click.IntRange(min=1), help="PyTorch's threads; default: one a core.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the ids.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def offload(
    part: str,
    lookups: int,
    rows: int,
    dim: int,
    zipf: float,
    steps: int,
    warmup: int,
    optimizer: str,
    mode: Literal["window", "resident"],
    depth: int,
    window_rows: int | None,
    compute_ms: float,
    job: str,
    runs: int,
    plain_allocator: bool,
    threads: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Time the tables in host memory beside what people use today, on Zipf-distributed ids.

    \b
    Parts:
      path      lookup, backward and update, beside PyTorch's SparseAdam and Adam and FBGEMM's embedding
      scaling   the same ids in a table of 64 times the rows
      planning  planning a step, beside the step
      stall     waiting for rows by look-ahead, over an emulated link, on one and two ranks
      job       a training job's step with offload.mode=window and with resident
    """
    from rich.console import Console

    from launch.bench.options import BenchOptions
    from launch.bench.run import run_parts, to_json
    from launch.bench.workload import Workload
    from train.machine import usable_cores

    options = BenchOptions(
        workload=Workload(lookups, rows, dim, zipf, seed),
        steps=steps,
        warmup=warmup,
        optimizer=optimizer,
        mode=mode,
        depth=depth,
        window_rows=window_rows,
        threads=threads or usable_cores(),
        plain_allocator=plain_allocator,
        compute_ms=compute_ms,
        job=job,
        runs=runs,
    )
    sections = run_parts(_PARTS if part == "all" else (part,), options)
    if as_json:
        click.echo(json.dumps(to_json(sections, options), indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    for section in sections.values():
        section.show(console)
