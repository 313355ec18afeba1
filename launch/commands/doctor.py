"""`engram doctor`."""

import json
import os

import click


@click.command(
    short_help="Check this machine for training.",
    epilog="""\b
Examples:
  engram doctor
  engram doctor configs/tiny.yaml run.nproc=2 --json
  srun --nodes=2 --ntasks-per-node=8 engram doctor configs/tiny.yaml
""",
)
@click.argument("config", required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(config: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Check what this machine has and lacks for training, and for the job of the YAML file CONFIG.

    One line per check: ok, warning, or missing, and what to do. Under a launcher, as for `engram train`, it checks all
    hosts, measures exchanges between all ranks and between all pairs of hosts, and rank 0 reports. Exit code 1 if
    anything is missing.
    """
    from launch.cluster.meeting import check_meeting
    from launch.cluster.place import Place
    from launch.cluster.started import rank_environment
    from train.config.file import load
    from train.config.job import JobConfig

    job = load(config, overrides, JobConfig) if config else None
    place = Place.of(os.environ)
    if place:
        check_meeting(place)
        os.environ.update(rank_environment(place))

    from launch.doctor.check import Check, is_missing, lines, to_json
    from launch.doctor.software import software

    findings: dict[str, list[Check]] = {"here": list(software())}
    if not is_missing(findings):  # else the other checks cannot be imported
        from launch.doctor.examine import examine

        findings = examine(job, place)
    if place is None or place.rank == 0:
        click.echo(json.dumps(to_json(findings), indent=2) if as_json else "\n".join(lines(findings)))
    raise SystemExit(is_missing(findings))
