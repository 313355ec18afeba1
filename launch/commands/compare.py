"""`engram compare`."""

import json

import click


@click.command(
    short_help="Compare runs by their ends.",
    epilog="""\b
Examples:
  engram compare runs/tiny runs/no-memory
  engram compare runs/study-* --json
""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(runs: tuple[str, ...], as_json: bool) -> None:
    """Compare runs (folders, or names in runs/), by their ends.

    If one is not finished, by the last step after which all of them were evaluated.

    Runs that differ only in their seed are one line: mean, and lowest to highest. The other lines' losses are also
    given as differences from the first line's, seed by seed where seeds are shared.
    """
    from train.report.comparison import contenders, open_runs

    opened, step = open_runs(runs)
    found = contenders(opened)
    if as_json:
        from launch.commands.comparison_report import as_dict

        click.echo(json.dumps(as_dict(found, step), indent=2))
        return
    from rich.console import Console

    from launch.commands.comparison_report import show

    show(found, Console(), step)
