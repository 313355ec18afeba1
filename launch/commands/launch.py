"""`engram launch`."""

import click

_LAUNCHERS = ("local", "hosts", "hostfile", "slurm", "kubernetes")


@click.command(
    short_help="Train a job on many nodes.",
    epilog="""\b
Examples:
  engram launch configs/tiny.yaml --dry-run
  engram launch configs/tiny.yaml --on hosts 'launch.hosts=[node1, node2]' run.nproc=8 launch.ssh=true
  engram launch configs/tiny.yaml --on slurm launch.nodes=2 run.nproc=8 launch.slurm.cpus_per_rank=12 --submit
""",
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option(
    "--on", "launcher", type=click.Choice(_LAUNCHERS), default="local", show_default=True, help="What starts the ranks."
)
@click.option("--dry-run", is_flag=True, help="Print what would be written and run; write and run nothing.")
@click.option(
    "--submit", is_flag=True, help="slurm, kubernetes: submit the job; without it, print the command that does."
)
def command(config: str, overrides: tuple[str, ...], launcher: str, dry_run: bool, submit: bool) -> None:
    """Train the job that the YAML file CONFIG describes on the nodes that its section `launch` describes.

    Copies code and config into the run's folder, with what the launcher needs: torchrun (`hosts`), DeepSpeed's launcher
    (`hostfile`), sbatch or kubectl. Run the same command again to continue from the newest checkpoint. See
    docs/launch.md for each launcher.
    """
    from launch.cluster.launchers import LAUNCHERS, command_lines, shown, start
    from launch.cluster.layout import Launch
    from launch.cluster.snapshot import write
    from train.config.file import load
    from train.config.job import JobConfig

    rendered = LAUNCHERS[launcher](Launch.next(load(config, overrides, JobConfig)))
    if submit and not rendered.queue:
        raise click.UsageError(f"--submit has no meaning with --on {launcher}, which has no queue.")
    if dry_run:
        click.echo(shown(rendered), nl=False)
        return
    write(rendered.launch, rendered.files)
    click.echo(f"files of this launch: {rendered.launch.folder}", err=True)
    nodes = rendered.launch.job.launch.node_count
    if launcher == "local" and nodes > 1:
        click.echo(f"starting on this machine only: give --on to start all {nodes} nodes", err=True)
    if rendered.told:
        click.echo(rendered.told)
    elif rendered.queue and not submit:
        click.echo(f"submit it with\n  {command_lines(rendered)}")
    else:
        start(rendered)
