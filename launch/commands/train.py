"""`engram train`."""

import os
from pathlib import Path

import click


@click.command(
    short_help="Train a job.",
    epilog="""\b
Examples:
  engram train configs/tiny.yaml
  engram train configs/tiny.yaml train.steps=50 run.name=short --nproc 1
""",
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option(
    "--nproc", type=click.IntRange(min=1, max=1024), help="Local ranks; default: run.nproc, else one per GPU, else 2."
)
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout; the rest goes to stderr.")
def command(config: str, overrides: tuple[str, ...], nproc: int | None, as_json: bool) -> None:
    """Train the job that the YAML file CONFIG describes.

    Starts its own local ranks, and ends them all when one fails. Under torchrun, srun, mpirun, DeepSpeed's launcher or
    in a pod of an indexed Job, it is one of their ranks (docs/launch.md). Run the same command again to continue from
    the newest checkpoint.
    """
    from launch.cluster.place import Place
    from launch.cluster.started import become_rank
    from launch.local.environment import may_use_gpus, meeting_port, rank_count, visible_gpus
    from launch.local.failures import RankFailed
    from launch.local.rank import rank_command
    from launch.local.refused import refuse
    from launch.local.restart import with_restarts
    from launch.local.signals import Stopped
    from launch.local.start import run_ranks
    from train.config.file import load
    from train.config.job import JobConfig
    from train.errors import UserError
    from train.run_state import record_end

    place = Place.of(os.environ)
    if place and nproc is not None:
        raise click.UsageError(f"--nproc has no meaning under a launcher: {place.launcher} decides.")
    job = load(config, overrides, JobConfig)
    run = job.run
    if place:
        become_rank(place, rank_command(config, overrides, as_json=as_json))
    if may_use_gpus():
        click.echo("counting the GPUs", err=as_json)
    gpus = visible_gpus()
    refuse(job, gpus)
    ranks, port = rank_count(nproc or run.nproc, gpus), meeting_port(run.port)
    folder = Path(run.dir, run.name)
    click.echo(f"starting {ranks} rank(s) on {'GPUs' if gpus else 'the CPU'}; everything goes to {folder}", err=as_json)

    def start(again: bool) -> int:
        wanted = [*overrides, "checkpoint.resume=auto"] if again else overrides
        try:
            return run_ranks(
                rank_command(config, wanted, as_json=as_json),
                ranks,
                log_folder=folder / "logs",
                port=run.port if again else port,
                gpus=gpus,
                grace_s=job.checkpoint.grace_s,
            )
        except Stopped as stopped:
            record_end(folder, "interrupted", str(stopped))
            raise
        except (UserError, RankFailed) as failure:
            record_end(folder, "failed", str(failure))
            raise

    if code := with_restarts(start, job.train.restarts, lambda text: click.echo(text, err=True)):
        raise SystemExit(code)
