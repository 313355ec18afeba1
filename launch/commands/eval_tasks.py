"""Tasks of `engram eval`: in this process, as one of several ranks, or by starting them."""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Asked:
    """What to evaluate; see the options of `engram eval`."""

    run: str
    step: int | None
    tasks: str
    include: str | None
    shots: int | None
    limit: int | None
    seed: int
    as_json: bool

    def rank_command(self) -> list[str]:
        """The command line of one rank."""
        return [sys.executable, "-P", "-m", "launch.commands.eval_tasks", json.dumps(asdict(self))]


def evaluate_tasks(asked: Asked, nproc: int | None) -> None:
    """Evaluates tasks and shows the figures: on `nproc` ranks, or as the rank that another launcher made this process.

    Raises:
        UserError: no such task, data or GPU, or the ranks cannot meet.
        RankFailed: a rank crashed.
    """
    from launch.cluster.place import Place
    from launch.cluster.started import become_rank

    place = Place.of(os.environ)
    if place and nproc is not None:
        raise click.UsageError(f"--nproc has no meaning under a launcher: {place.launcher} decides.")
    if place:
        become_rank(place, asked.rank_command())
    if nproc is None or nproc == 1:
        _answer(asked)
        return

    from launch.local.environment import rank_count, visible_gpus
    from launch.local.start import run_ranks

    gpus = visible_gpus()
    with tempfile.TemporaryDirectory(prefix="engram-eval-") as logs:
        run_ranks(asked.rank_command(), rank_count(nproc, gpus), log_folder=Path(logs), gpus=gpus, grace_s=0)


def _answer(asked: Asked) -> None:
    from train.use.harness import run_tasks
    from train.use.saved_run import SavedRun

    results = run_tasks(
        SavedRun.open(asked.run, asked.step),
        [name.strip() for name in asked.tasks.split(",")],
        folder=asked.include,
        shots=asked.shots,
        limit=asked.limit,
        seed=asked.seed,
    )
    if results is not None:
        _show(results, asked.as_json)


def _show(results: dict[str, Any], as_json: bool) -> None:
    """Prints figures by task, as `train.use.harness.run_tasks` returns them."""
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for task, figures in results["tasks"].items():
        click.echo(task)
        for name, value in figures.items():
            click.echo(f"  {name:<28} {value:.4f}" if isinstance(value, float) else f"  {name:<28} {value}")


def _rank() -> None:
    import torch.distributed as dist

    from train.ranks import join_on_hosts

    join_on_hosts()
    _answer(Asked(**json.loads(sys.argv[1])))
    dist.barrier()  # rank 0 may still be reading what the others sent
    dist.destroy_process_group()


if __name__ == "__main__":
    from launch.local.rank import end_rank

    end_rank(_rank)
