"""What `engram plan` does once its arguments have been checked; heavy imports are inside."""

import json
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from launch.plan.cluster import Cluster
    from launch.plan.hardware import Hardware, Network
    from train.config.job import JobConfig
    from train.progress import Progress

_WIDTH = 80
_CALIBRATED = "# Measured by `engram plan --calibrate`; launch/plan/hardware.yaml says what each key means.\n"


def assess(
    job: "JobConfig", cluster: "Cluster", tokens: int | None, price: float | None, zipf: float | None, *, as_json: bool
) -> None:
    """Reports what a job takes of machines."""
    from launch.console import open_console
    from launch.plan import assessment
    from launch.plan.phases import largest, phase_jobs
    from launch.plan.report.answer import to_json
    from launch.plan.report.figures import show
    from launch.plan.report.machines import show_machines, show_phases
    from train.errors import UserError

    jobs = phase_jobs(job)
    if len(jobs) > 1 and tokens is not None:
        raise UserError("--tokens: the job has data.phases, which say how many tokens each takes; leave it out")
    with _progress("replaying") as progress:

        def told(step: int, of: int) -> None:
            progress.expect(0 if step else of)
            progress.advance()

        phases = [assessment.assess(phase, cluster, tokens=tokens, price=price, zipf=zipf, told=told) for phase in jobs]
    found = phases[jobs.index(largest(jobs))]
    if as_json:
        parts = {"phases": [to_json(phase) for phase in phases]} if len(phases) > 1 else {}
        click.echo(json.dumps(to_json(found) | parts, indent=2))
        return
    console = open_console(_WIDTH)
    show(found.figures, console)
    show_machines(found, console)
    if len(phases) > 1:
        show_phases(phases, console)


def simulate(
    job: "JobConfig",
    worlds: tuple[int, ...],
    growing: int,
    gpus_per_node: int,
    hardware: "Hardware",
    network: "Network",
    zipf: float | None,
    plot: str | None,
    *,
    as_json: bool,
) -> None:
    """Replays a job's rows at many world sizes."""
    from launch.console import open_console
    from launch.plan.phases import largest, phase_jobs
    from launch.plan.report.scale import draw, show_scale
    from launch.plan.scale import Machines, scaled

    with _progress("simulating", 1 + 2 * len(worlds)) as progress:
        numbers = count()

        def told(text: str) -> None:
            progress.show(next(numbers), text, at_once=True)

        told("planning a rank's step")
        work = scaled(largest(phase_jobs(job)), Machines(hardware, network, gpus_per_node), zipf, growing)
        points = list(work.points(worlds, told))
    if plot:
        draw(points, f"{job.run.name}; {points[0].stream}", Path(plot))
    if as_json:
        click.echo(json.dumps([point.to_json() for point in points], indent=2))
    else:
        show_scale(points, open_console(_WIDTH))


def calibrate(file: Path) -> None:
    """Measures this machine and writes its numbers.

    Raises:
        UserError: the file's folder does not exist, or its disk has too little space to be measured.
    """
    from train.errors import UserError

    if not file.parent.is_dir():
        raise UserError(f"--calibrate {file}: there is no folder {file.parent}")

    from launch.calibrate.machine import calibrated
    from launch.local.environment import meeting_port, rank_environment
    from launch.plan.hardware import Catalogue
    from train.config import yaml_text
    from train.files import new_file

    with _progress("measuring") as progress, tempfile.TemporaryDirectory(prefix="engram-plan-") as folder:
        alone = rank_environment(0, 1, meeting_port(None), gpus=0)
        numbers = calibrated(progress, f"{folder}/ranks", environment=alone, disk=str(file.parent))
    Catalogue.model_validate(numbers)
    with new_file(file) as partial:
        partial.write_text(_CALIBRATED + yaml_text.render(numbers), encoding="utf-8")
    click.echo(f"wrote {file}: engram plan CONFIG --hardware {file} --gpu here --network loopback")


def _progress(name: str, total: int = 0) -> "Progress":
    """On a terminal; nothing elsewhere."""
    from train.progress import Progress

    return Progress(name, total, active=sys.stderr.isatty())
