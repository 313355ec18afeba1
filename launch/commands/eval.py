"""`engram eval`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from train.use.saved_run import SavedRun


@click.command(
    epilog="""\b
Examples:
  engram eval runs/tiny
  engram eval tiny --data data/mine --json
  engram eval tiny --tasks arc_easy,hellaswag --limit 200
"""
)
@click.argument("run")
@click.option("--step", type=click.IntRange(min=1), help="Step of the checkpoint; default: the newest.")
@click.option("--data", metavar="DIR", help="Prepared text; default: the run's own.")
@click.option("--split", type=click.Choice(["validation", "all"]), help="Documents to evaluate; default: validation "
              "for the run's own text, all for other text.")  # fmt: skip
@click.option("--sequences", type=click.IntRange(min=1), help="Evaluate only the first so many sequences.")
@click.option("--tasks", metavar="NAME[,NAME...]", help="Run tasks of lm-evaluation-harness instead.")
@click.option("--include", metavar="DIR", help="Folder with additional task files (YAML).")
@click.option("--shots", type=click.IntRange(min=0), help="Worked examples before each question.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask only the first so many questions of each task.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    run: str,
    step: int | None,
    data: str | None,
    split: Literal["validation", "all"] | None,
    sequences: int | None,
    tasks: str | None,
    include: str | None,
    shots: int | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """Evaluate the trained RUN (a run's folder, or its name in runs/).

    Reports the loss in nats per token and bits per byte; with --tasks, the results of lm-evaluation-harness.
    """
    from train.run_folder import find_run

    for option, value in (("--include", include), ("--shots", shots), ("--limit", limit)):
        if value is not None and tasks is None:
            raise click.UsageError(f"{option} has no meaning without --tasks.")
    for option, value in (("--data", data), ("--split", split), ("--sequences", sequences)):
        if value is not None and tasks is not None:
            raise click.UsageError(f"{option} has no meaning with --tasks.")
    folder = find_run(run)  # before what takes seconds to import

    from train.use.saved_run import SavedRun

    saved = SavedRun.open(folder, step)
    if tasks is not None:
        from train.use.harness import run_tasks

        _show_tasks(run_tasks(saved, tasks.split(","), folder=include, shots=shots, limit=limit), as_json)
        return
    _score(saved, data, split, sequences, as_json)


def _score(
    saved: "SavedRun",
    data: str | None,
    split: Literal["validation", "all"] | None,
    sequences: int | None,
    as_json: bool,
) -> None:
    """Evaluates a run on its own text, or on that of `data`, and prints what was found."""
    from dataclasses import asdict

    from train.data.blend import Blend
    from train.data.store import TokenStore
    from train.use.scoring import score, score_blend

    if data is None:
        blend = Blend.open(saved.job.data, saved.job.train.global_batch_size)
        found = score_blend(saved, blend, split=split or "validation", sequences=sequences)
    else:  # a prepared folder has its own tokenizer
        store = TokenStore.open(data, tokenizer=None if Path(data).is_dir() else saved.tokenizer)
        own = store.fingerprint in json.dumps(saved.image.manifest.data)
        found = score(saved, store, split=split or ("validation" if own else "all"), sequences=sequences)
    if as_json:
        values = {name: value for name, value in asdict(found).items() if name != "by_source" or value}
        click.echo(json.dumps({"step": saved.step, **values}, indent=2))
        return
    bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits/byte"
    click.echo(f"step {saved.step}: {found.loss:.4f} nats/token{bits}")
    click.echo(f"over {found.tokens:,} tokens, {found.text_bytes:,.0f} bytes")
    for name, part in found.by_source.items():
        click.echo(f"{name}: {part.loss:.4f} nats/token over {part.tokens:,} tokens")


def _show_tasks(results: dict[str, Any], as_json: bool) -> None:
    """Prints figures by task, as `train.use.harness.run_tasks` returns them."""
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for task, figures in results["tasks"].items():
        click.echo(task)
        for name, value in figures.items():
            click.echo(f"  {name:<28} {value:.4f}" if isinstance(value, float) else f"  {name:<28} {value}")
