"""`engram plan`."""

import json

import click

_WIDTH = 140  # of a table that no terminal shows


@click.command(
    epilog="""\b
Examples:
  engram plan configs/paper/engram-27b.yaml
  engram plan configs/paper/engram-27b.yaml offload.row_dtype=bf16 --ranks 64 --json
"""
)
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option(
    "--ranks", type=click.IntRange(1, 65536), default=8, show_default=True, help="Ranks that share the tables."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(config: str, overrides: tuple[str, ...], ranks: int, as_json: bool) -> None:
    """Count parameters, FLOPs and memory of the job that the YAML file CONFIG describes.

    Parameters by part, active parameters and FLOPs per token, rows and memory of the Engram tables. Builds nothing:
    needs no memory, data or tokenizer.
    """
    from train.config.file import load
    from train.config.job import JobConfig

    job = load(config, overrides, JobConfig)  # before what takes seconds to import

    from rich.console import Console

    from launch.plan.figures import plan
    from launch.plan.report import show

    figures = plan(job, ranks)
    if as_json:
        click.echo(json.dumps(figures.to_json(), indent=2))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    show(figures, console)
