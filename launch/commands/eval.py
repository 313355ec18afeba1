"""`engram eval`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from launch.commands.numbers import SEED

if TYPE_CHECKING:
    from train.use.saved_run import SavedRun


@click.command(
    short_help="Evaluate a trained run.",
    epilog="""\b
Examples:
  engram eval runs/tiny
  engram eval tiny --data data/mine --json
  engram eval tiny --tasks arc_easy,hellaswag --limit 200
  engram eval tiny --tasks gsm8k --nproc 8
""",
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
@click.option("--seed", type=SEED, help="Random seed of answers that a task samples; default: 0.")
@click.option("--nproc", type=click.IntRange(min=1, max=1024), help="Ranks that share the questions, each with the "
              "whole model (on its own GPU); default: this process.")  # fmt: skip
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
    seed: int | None,
    nproc: int | None,
    as_json: bool,
) -> None:
    """Evaluate the trained RUN (a run's folder, or its name in runs/).

    Reports the loss in nats per token and bits per byte; with --tasks, the results of lm-evaluation-harness, also as
    one of the ranks of torchrun, srun or mpirun.
    """
    from train.run_folder import find_run

    of_tasks = {"--include": include, "--shots": shots, "--limit": limit, "--seed": seed, "--nproc": nproc}
    for option, value in of_tasks.items():
        if value is not None and tasks is None:
            raise click.UsageError(f"{option} has no meaning without --tasks.")
    for option, value in (("--data", data), ("--split", split), ("--sequences", sequences)):
        if value is not None and tasks is not None:
            raise click.UsageError(f"{option} has no meaning with --tasks.")
    if tasks is not None and not all(name.strip() for name in tasks.split(",")):
        raise click.UsageError("--tasks has an empty name.")
    folder = find_run(run)  # before what takes seconds to import

    if tasks is not None:
        from launch.commands.eval_tasks import Asked, evaluate_tasks

        evaluate_tasks(Asked(str(folder), step, tasks, include, shots, limit, seed or 0, as_json), nproc)
        return

    from train.use.saved_run import SavedRun

    _score(SavedRun.open(folder, step), data, split, sequences, as_json)


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
    from train.data.remote.files import is_url
    from train.data.stores.store import TokenStore
    from train.use.scoring import score, score_blend

    if data is None:
        blend = Blend.open(saved.job.data, saved.job.train.global_batch_size)
        found = score_blend(saved, blend, split=split or "validation", sequences=sequences)
    else:  # a prepared folder has its own tokenizer
        own_tokenizer = Path(data).is_dir() or is_url(data)
        store = TokenStore.open(
            data, tokenizer=None if own_tokenizer else saved.tokenizer, how=saved.job.data.elsewhere
        )
        own = store.fingerprint in fingerprints(saved.image.manifest.data)
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


def fingerprints(data: dict[str, Any]) -> set[str]:
    """Of the stores that a run reads in any of its phases, out of what `Timetable.identity` says of its data."""
    phases = [data, *data.get("phases", [])]
    return {store for phase in phases for store, _ in phase.get("mix") or [(phase["fingerprint"], 1)]}
