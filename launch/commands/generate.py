"""`engram generate`."""

import json

import click

from launch.commands.numbers import SEED, Finite


@click.command(
    short_help="Continue a text with a trained run.",
    epilog="""\b
Examples:
  engram generate runs/tiny "def main("
  engram generate tiny "import os" --tokens 100 --temperature 0.7 --top-k 40 --seed 1
""",
)
@click.argument("run")
@click.argument("prompt")
@click.option("--step", type=click.IntRange(min=1), help="Step of the checkpoint; default: the newest.")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Most new tokens.")
@click.option("--temperature", type=Finite(min=0), default=0.8, show_default=True,
              help="0 always takes the likeliest token.")  # fmt: skip
@click.option("--top-k", type=click.IntRange(min=1), help="Sample only from this many likeliest tokens.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Random seed for sampling.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    run: str,
    prompt: str,
    step: int | None,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Continue the text PROMPT with the trained RUN (a run's folder, or its name in runs/).

    Table rows are read from the checkpoint as tokens need them; the tables are never loaded whole.
    """
    from train.run_folder import find_run

    folder = find_run(run)  # before what takes seconds to import

    import torch

    from train.use.generation import Decoder, continuation
    from train.use.saved_run import SavedRun

    saved = SavedRun.open(folder, step)
    ids = saved.tokenizer.encode(prompt)
    with Decoder(saved.model(), saved.tables(), saved.job.data.longest) as decoder:
        new = list(
            continuation(
                decoder,
                saved.tokenizer,
                ids,
                num_tokens=tokens,
                temperature=temperature,
                top_k=top_k,
                generator=torch.Generator().manual_seed(seed),
            )
        )
    text = saved.tokenizer.decode([*ids, *new])
    if as_json:
        click.echo(json.dumps({"step": saved.step, "text": text, "prompt_tokens": len(ids), "new_tokens": len(new)}))
        return
    click.echo(text)
