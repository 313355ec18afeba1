"""`engram export`."""

import json
from typing import Literal

import click

from launch.commands.numbers import FileSize


@click.command(
    short_help="Write a trained run as safetensors.",
    epilog="""\b
Examples:
  engram export runs/tiny --to tiny-hf
  engram export tiny --to tiny-hf --dtype bf16 --shard-size 2GB
""",
)
@click.argument("run")
@click.option("--to", required=True, metavar="DIR", help="Folder to create; must not exist or be empty.")
@click.option("--step", type=click.IntRange(min=1), help="Step of the checkpoint; default: the newest.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16"]), help="Dtype of weights and rows; default: the run's train.dtype."
)
@click.option("--shard-size", type=FileSize(), default="5GB", show_default=True, help="Maximum file size.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def command(
    run: str, to: str, step: int | None, dtype: Literal["fp32", "bf16"] | None, shard_size: int, as_json: bool
) -> None:
    """Write the trained RUN (a run's folder, or its name in runs/) for Hugging Face's transformers.

    A model without Engram and hyper-connections becomes a plain DeepSeek-V3, every other brings its code along
    (trust_remote_code=True). Everything is streamed from the checkpoint, piece by piece. See docs/serve.md.
    """
    from dataclasses import asdict
    from pathlib import Path

    from train.run_folder import find_run

    folder = find_run(run)  # before what takes seconds to import

    from train.use.export import export
    from train.use.saved_run import SavedRun

    found = export(SavedRun.open(folder, step), Path(to), dtype=dtype, shard_bytes=shard_size)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    because = f" (deepseek_v3 has no {found.why})" if found.why else ""
    click.echo(
        f"step {found.step}: {found.tensors} tensors, {found.bytes / 1e9:.3f} GB in {found.files} file(s) of {to}, "
        f"as {found.model_type}{because}"
    )
