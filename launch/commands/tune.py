"""`engram tune`."""

import os
from pathlib import Path

import click

from launch.commands import tune_runs
from launch.commands.numbers import Finite


@click.command(
    short_help="Find a job's prefetch settings by measuring it.",
    epilog="""\b
Examples:
  engram tune configs/tiny.yaml
  engram tune configs/bench.yaml --minutes 5 --write
  engram tune --explain runs/tiny
""",
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--minutes", type=Finite(0.1, 600), default=10.0, show_default=True, help="Time limit.")
@click.option("--nproc", type=click.IntRange(min=1), help="Local ranks, as for `engram train`.")
@click.option("--out", metavar="FOLDER", help="For results and plot; default: RUN.DIR/RUN.NAME.tune.")
@click.option("--write", is_flag=True, help="Put the recommendation into CONFIG; all else in it stays.")
@click.option("--exhaustive", is_flag=True, help="Each look-ahead with each window, in all rounds, nothing else.")
@click.option("--anew", is_flag=True, help="Forget what an interrupted or earlier tuning has measured.")
@click.option("--explain", is_flag=True, help="CONFIG is a run's folder: say what its steps spend their time on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    config: str,
    overrides: tuple[str, ...],
    minutes: float,
    nproc: int | None,
    out: str | None,
    write: bool,
    exhaustive: bool,
    anew: bool,
    explain: bool,
    as_json: bool,
) -> None:
    """Find the prefetch settings of the job of CONFIG by measuring it here.

    The job is trained for some steps at one setting after another, in one process a rank: look-aheads and windows, then
    engine and programs on a GPU, then planner threads. Turns are interleaved and repeated, and slow settings are left
    out of later rounds. Nothing of the run's own folder is touched. The same command goes on where an earlier one was
    interrupted.
    """
    if explain:
        tune_runs.explain(config, as_json=as_json)
        return
    from launch.cluster.place import Place
    from launch.local.environment import may_use_gpus, rank_count, visible_gpus
    from launch.local.refused import refuse
    from launch.plan.bounds import check_sizes
    from train.config.file import load
    from train.config.job import JobConfig

    job = load(config, overrides, JobConfig)
    if place := Place.of(os.environ):
        raise click.UsageError(f"it starts its own ranks on this machine, and has no use for {place.launcher}'s.")
    tune_runs.require_tables(job)
    if may_use_gpus():
        click.echo("counting the GPUs", err=True)
    gpus = visible_gpus()
    refuse(job, gpus)
    ranks = rank_count(nproc or job.run.nproc, gpus)
    check_sizes(job, ranks)
    folder = Path(out) if out else Path(job.run.dir, f"{job.run.name}.tune")
    asked = tune_runs.Tuning(config, overrides, job, folder, ranks, gpus, minutes, exhaustive)
    tune_runs.tune(asked, write=write, anew=anew, as_json=as_json)
