"""`engram data`."""

import click

from launch.commands.data_stores import merge, show, split, stats, verify


@click.group(short_help="Prepare, join, split, count and check token stores.")
def command() -> None:
    """Prepare token stores from text; join, split, count and check them."""


for _each in (merge, split, stats, verify, show):
    command.add_command(_each)


@command.command(
    epilog="""\b
Examples:
  engram data prepare my-texts/ --out data/mine --train-bpe 16384
  engram data prepare a.jsonl.zst b.parquet --out data/web --tokenizer deepseek --workers 8
"""
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--out", required=True, metavar="DIR", help="Folder to create.")
@click.option("--tokenizer", metavar="NAME|FILE", help="`deepseek`, a tokenizer.json, or a hub's owner/name.")
@click.option("--train-bpe", type=click.IntRange(min=1), metavar="VOCAB", help="Train a byte-level BPE on the text.")
@click.option("--workers", type=click.IntRange(min=1, max=1024), help="Tokenizing processes; default: one per core.")
@click.option("--text-key", default="text", show_default=True, metavar="K", help="Field or column with the text.")
@click.option("--strict", is_flag=True, help="Stop at the first bad line; default: count and report them.")
@click.option("--overwrite", is_flag=True, help="Replace the token store at --out.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON on stdout.")
def prepare(
    sources: tuple[str, ...],
    out: str,
    tokenizer: str | None,
    train_bpe: int | None,
    workers: int | None,
    text_key: str,
    strict: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn text files and folders into a token store.

    SOURCE is a folder or a file: .txt, .md, .py, .rst, .jsonl (also .jsonl.gz, .jsonl.zst, .json.gz, .json.zst) or
    .parquet; or a URL (https://, s3://, hf://), read without a local copy. Other files in a folder are counted, shown
    and kept in the manifest.
    """
    if (tokenizer is None) == (train_bpe is None):
        raise click.UsageError("Give one of --tokenizer and --train-bpe.")
    from train.data.preparation.prepare import prepare as prepare_store

    manifest = prepare_store(
        sources,
        out,
        tokenizer=tokenizer,
        train_bpe=train_bpe,
        workers=workers,
        text_key=text_key,
        strict=strict,
        overwrite=overwrite,
    )
    if as_json:
        click.echo(manifest.to_json())
