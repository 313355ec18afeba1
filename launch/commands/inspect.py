"""`engram inspect`."""

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command(
    short_help="Show what a run's memory does for a text.",
    epilog="""\b
Examples:
  engram inspect runs/tiny "import os"
  engram inspect tiny --file train/trainer.py --top 20
  engram inspect tiny "def main(" --json
""",
)
@click.argument("run")
@click.argument("text", required=False)
@click.option("--file", type=click.Path(exists=True, dir_okay=False), help="Take the text from a file instead.")
@click.option("--step", type=click.IntRange(min=1), help="Step of the checkpoint; default: the newest.")
@click.option("--top", type=click.IntRange(min=1), help="List the most used rows of each layer instead.")
@click.option("--likeliest", type=click.IntRange(min=1), default=2, show_default=True, help="Next tokens to show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    run: str, text: str | None, file: str | None, step: int | None, top: int | None, likeliest: int, as_json: bool
) -> None:
    """Show what the memory of RUN (a run's folder, or its name in runs/) does for TEXT.

    For each token and Engram layer: how far the gate opens, the n-grams that are looked up, and how often each of their
    rows was updated (255: that often or more); what comes next with the memory, and with it switched off. Rows are read
    from the checkpoint as they are needed.
    """
    from train.run_folder import find_run

    if (text is None) == (file is None):
        raise click.UsageError("Give one of TEXT and --file.")
    folder = find_run(run)  # before what takes seconds to import
    given = text if file is None else _read(file)

    from train.use.inspection import Inspector
    from train.use.saved_run import SavedRun
    from train.use.usage import most_used

    saved = SavedRun.open(folder, step)
    inspector = Inspector(saved)
    if top is not None:
        used = most_used(inspector, given or "", top)
        if as_json:
            click.echo(json.dumps({"step": saved.step, "rows": [asdict(row) for row in used]}, indent=2))
            return
        from launch.commands.inspect_report import show_used

        show_used(used)
        return
    found = [view for ids in inspector.pieces(given or "") for view in inspector.look(ids, likeliest=likeliest)]
    if as_json:
        click.echo(json.dumps({"step": saved.step, "tokens": [view.to_json() for view in found]}, indent=2))
        return
    from launch.commands.inspect_report import show_tokens

    show_tokens(found)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file}: not UTF-8 text (byte {error.start}).") from None
