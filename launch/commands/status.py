"""`engram status`."""

import json
import time

import click

_EVERY_S = 2.0


@click.command(
    short_help="Show how runs are, from any host.",
    epilog="""\b
Examples:
  engram status runs/tiny
  engram status tiny --watch
  engram status runs/study-* --json
""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--watch", is_flag=True, help="Refresh in place until no run is at work any more, or Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(runs: tuple[str, ...], watch: bool, as_json: bool) -> None:
    """Show how runs are (folders, or names in runs/), at work or ended, from any host that sees their folders.

    A run that says it is running, but whose ranks have given no heartbeat for 20 s, is called lost.
    """
    if watch and as_json:
        raise click.UsageError("--watch has no meaning with --json.")

    from train.run_folder import find_run
    from train.status.status import Observed

    observed = [Observed(find_run(run)) for run in runs]
    if as_json:
        click.echo(json.dumps({"runs": [each.look(well=True).to_json() for each in observed]}, indent=2))
        return

    from rich.console import Console
    from rich.live import Live

    from launch.commands.status_report import shown

    console = Console(highlight=False)
    found = [each.look(well=not watch) for each in observed]
    if not watch:
        console.print(shown(found))
        return
    try:
        with Live(shown(found), console=console, auto_refresh=False) as live:
            while any(status.active for status in found):
                time.sleep(_EVERY_S)
                found = [each.look() for each in observed]
                live.update(shown(found), refresh=True)
    except KeyboardInterrupt:
        return
