"""`engram report`."""

from pathlib import Path

import click


@click.command(
    short_help="Write a page about runs.",
    epilog="""\b
Examples:
  engram report runs/tiny
  engram report runs/tiny runs/no-memory --out comparison.html
  engram report tiny --png --text "import os"
""",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=click.Path(dir_okay=False), help="File to write; default: report.html in the first run's "
              "folder.")  # fmt: skip
@click.option("--text", help="Text whose gates are shown; default: the config's eval.prompts.")
@click.option("--png", is_flag=True, help="Also write the line charts as PNG files beside the page (matplotlib).")
@click.option("--no-memory", is_flag=True, help="Leave out what has to be read from a checkpoint.")
def command(runs: tuple[str, ...], out: str | None, text: str | None, png: bool, no_memory: bool) -> None:
    """Write a page about runs (folders, or names in runs/), at work or ended.

    One HTML file that needs no network. Several runs are laid over each other.
    """
    from train.run_folder import find_run

    if text is not None and no_memory:
        raise click.UsageError("--text has no meaning with --no-memory.")
    folders = [find_run(run) for run in runs]

    from train.files import new_file
    from train.page.page import page
    from train.page.told_run import ToldRun

    told = [ToldRun(folder, number) for number, folder in enumerate(folders)]
    memory: list[str] = []
    if not no_memory:
        from train.page.memory_part import memory_part

        memory = [memory_part(run, text) for run in told if run.job.model.engram]
    target = Path(out) if out else folders[0] / "report.html"
    with new_file(target) as partial:
        partial.write_text(page(told, memory), encoding="utf-8")
    click.echo(str(target))
    if png:
        from launch.commands.report_pictures import write_pictures

        for picture in write_pictures(told, target):
            click.echo(str(picture))
