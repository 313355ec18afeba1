"""What `engram tune` does once its arguments were checked; heavy imports are within."""

import hashlib
import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from train.errors import UserError

if TYPE_CHECKING:
    from launch.tune.results import Results
    from offload.config import OffloadConfig
    from train.config.job import JobConfig

_WIDTH = 100
_TUNED = {"offload.depth", "offload.window_rows", "offload.engine", "offload.planner_threads", "offload.programs"}


@dataclass(frozen=True)
class Tuning:
    """What is to be tuned, and where. `gpus` are those of this machine; `folder` is for the results."""

    config: str
    overrides: tuple[str, ...]
    job: "JobConfig"
    folder: Path
    ranks: int
    gpus: int
    minutes: float
    exhaustive: bool

    @property
    def written(self) -> "OffloadConfig":
        """What the file says, where the command line has overrides of what is tuned."""
        from train.config.file import load
        from train.config.job import JobConfig

        kept = [word for word in self.overrides if word.partition("=")[0] not in _TUNED]
        return load(self.config, kept, JobConfig).offload

    @property
    def digest(self) -> str:
        """Of everything that the measurements depend on."""
        from offload.host.cores import usable_cores

        told = [self.job.model_dump(exclude={"run"}), self.ranks, self.gpus, self.exhaustive, platform.node()]
        return hashlib.sha256(json.dumps([*told, usable_cores()], default=str).encode()).hexdigest()


def require_tables(job: "JobConfig") -> None:
    """Raises UserError if there is nothing to tune."""
    if job.model.engram is None:
        raise UserError("model.engram is null: a model without tables fetches no rows, and there is nothing to tune")
    if job.offload.mode == "resident":
        raise UserError("offload.mode=resident fetches no rows, and there is nothing to tune: set offload.mode=window")


def tune(asked: Tuning, *, write: bool, anew: bool, as_json: bool) -> None:
    """Measures what is not measured yet, and tells what came of it."""
    from train.config.yaml_edit import set_in_file

    results = _measured(asked, anew=anew)
    assert results.best is not None
    assert results.start is not None
    changes = results.best.changes(asked.written, results.start.engine)
    if write and changes:
        set_in_file(asked.config, "offload", changes)
    if as_json:
        from launch.tune.verdict import to_json

        click.echo(json.dumps(to_json(results, changes), indent=2))
    else:
        from launch.console import open_console
        from launch.tune.report import show

        show(results, changes, asked.config, open_console(_WIDTH), written=write)
    _draw(asked, results)


def _measured(asked: Tuning, *, anew: bool) -> "Results":
    from launch.local.start import run_ranks
    from train.run_lock import lock_run

    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{asked.folder}: cannot be created ({error.strerror})") from None
    held = lock_run(asked.folder)
    from launch.tune.asked import Asked, worker_command
    from launch.tune.results import RESULTS_FILE, Results

    if anew:
        (asked.folder / RESULTS_FILE).unlink(missing_ok=True)
    results = Results.read(asked.folder, asked.digest)
    if results.turns:
        click.echo(f"going on from {len(results.turns)} turns in {asked.folder}", err=True)
    if not results.finished and results.seconds < 60 * asked.minutes:
        click.echo(f"starting {asked.ranks} rank(s); results go to {asked.folder}", err=True)
        with tempfile.TemporaryDirectory(prefix="engram-tune-") as work:
            to_measure = Asked(
                asked.config, [*asked.overrides], str(asked.folder), work, asked.digest, asked.minutes, asked.exhaustive
            )
            run_ranks(worker_command(to_measure), asked.ranks, log_folder=asked.folder / "logs", gpus=asked.gpus)
        results = Results.read(asked.folder, asked.digest)
    held.release()
    if not results.turns:
        raise UserError(f"nothing was measured within --minutes {asked.minutes:g}: give it more")
    return results


def _draw(asked: Tuning, results: "Results") -> None:
    from launch.tune.report import PLOT_FILE, draw

    plot = asked.folder / PLOT_FILE
    try:
        draw(results, f"{asked.job.run.name}, {asked.ranks} rank(s)", plot)
    except UserError as error:
        click.echo(f"no plot: {error}", err=True)  # the figures are there all the same
    else:
        click.echo(f"plot: {plot}", err=True)


def explain(run: str, *, as_json: bool) -> None:
    """Says what a run's steps spend their time on, and what to set.

    Raises:
        UserError: there is no such run, or it has recorded no stages.
    """
    from launch.tune.explain import explained
    from train.run_folder import find_run

    found = explained(find_run(run))
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
        return
    from launch.console import open_console
    from launch.tune.explain_report import show

    show(found, open_console(_WIDTH))
