"""`engram data merge | split | stats | verify | show`: what is done with prepared stores."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.commands.numbers import Finite

if TYPE_CHECKING:
    from train.data.stores.examine import Statistics
    from train.data.stores.store import TokenStore

_TOKENIZER = click.option("--tokenizer", metavar="NAME|FILE", help="For a plain Megatron pair: what made its tokens.")
_OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace what is there.")


def _open(store: str, tokenizer: str | None) -> "TokenStore":
    from train.data.stores.store import TokenStore
    from train.data.tokenization.tokenizer import Tokenizer

    return TokenStore.open(store, tokenizer=Tokenizer.load(tokenizer) if tokenizer else None)


@click.command(epilog="\b\nExample:\n  engram data merge data/a data/b --out data/both")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--out", required=True, metavar="DIR", help="Folder to create.")
@_TOKENIZER
@_OVERWRITE
def merge(stores: tuple[str, ...], out: str, tokenizer: str | None, overwrite: bool) -> None:
    """Join stores of one tokenizer, document after document."""
    from train.data.preparation import rewrite

    made = rewrite.merge([_open(store, tokenizer) for store in stores], Path(out), overwrite=overwrite)
    click.echo(f"{out}: {made.documents:,} documents, {made.tokens:,} tokens")


@click.command(
    short_help="Cut validation documents out of a store.",
    epilog="\b\nExample:\n  engram data split data/mine --held-out data/mine-val --rest data/mine-train",
)
@click.argument("store")
@click.option("--held-out", required=True, metavar="DIR", help="Folder to create, of the documents held out.")
@click.option("--rest", required=True, metavar="DIR", help="Folder to create, of the others.")
@click.option("--fraction", type=Finite(0, 1, min_open=True, max_open=True), default=0.05, show_default=True,
              help="Of the documents to hold out.")  # fmt: skip
@_TOKENIZER
@_OVERWRITE
def split(store: str, held_out: str, rest: str, fraction: float, tokenizer: str | None, overwrite: bool) -> None:
    """Cut validation documents out: those that training on STORE would hold out with that fraction."""
    from train.data.preparation import rewrite

    parts = rewrite.split(_open(store, tokenizer), Path(held_out), Path(rest), fraction, overwrite=overwrite)
    for place, made in zip((held_out, rest), parts, strict=True):
        click.echo(f"{place}: {made.documents:,} documents, {made.tokens:,} tokens")


@click.command(epilog="\b\nExamples:\n  engram data stats data/mine\n  engram data stats data/mine --plot lengths.png")
@click.argument("store")
@click.option("--plot", metavar="FILE", help="Also draw the lengths, as PNG or SVG (matplotlib).")
@_TOKENIZER
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def stats(store: str, plot: str | None, tokenizer: str | None, as_json: bool) -> None:
    """Count documents, tokens, lengths and exact duplicates."""
    from dataclasses import asdict

    from train.data.stores.examine import statistics
    from train.errors import UserError

    if plot is not None and not Path(plot).parent.is_dir():
        raise UserError(f"--plot {plot}: there is no folder {Path(plot).parent}")
    found = statistics(_open(store, tokenizer))
    if plot is not None:
        _draw(found, store, Path(plot))
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    click.echo(f"documents     {found.documents:,}")
    click.echo(f"tokens        {found.tokens:,}, {found.text_bytes / max(1, found.tokens):.2f} bytes each")
    click.echo(f"vocabulary    {found.used_entries:,} of {found.entries:,} entries occur")
    share = found.duplicate_tokens / max(1, found.tokens)
    click.echo(f"duplicates    {found.duplicates:,} documents equal an earlier one, {share:.1%} of the tokens")
    click.echo("lengths       " + ", ".join(f"{p} %: {tokens:,}" for p, tokens in found.quantiles.items()))
    most = max(documents for _, _, documents, _ in found.histogram)
    for least, largest, documents, tokens in found.histogram:
        bar = "#" * -(-30 * documents // most)
        click.echo(f"  {f'{least:,} to {largest:,}':>22} {documents:>12,} documents {tokens:>16,} tokens {bar}")


def _draw(found: "Statistics", store: str, file: Path) -> None:
    from launch.plotting import plots

    labels = [f"{least:,}" for least, *_ in found.histogram]
    title = f"{store}: {found.documents:,} documents, {found.tokens:,} tokens"
    with plots(file, title, 1, 2, (9, 3.5)) as axes:
        for axis, column, what in zip(axes, (2, 3), ("documents", "tokens"), strict=True):
            axis.bar(labels, [entry[column] for entry in found.histogram])
            axis.set(xlabel="tokens of a document, at least", ylabel=what)
            axis.tick_params(axis="x", rotation=60)


@click.command(
    short_help="Check a store against its manifest.", epilog="\b\nExample:\n  engram data verify data/mine data/web"
)
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
def verify(stores: tuple[str, ...]) -> None:
    """Read every byte and compare it with the manifest; look at every token and document end."""
    from train.data.stores.examine import check

    for name in stores:
        store = _open(name, None)
        check(store)
        click.echo(f"{name}: {store.num_documents:,} documents, {store.num_tokens:,} tokens, all as they were prepared")


@click.command(epilog="\b\nExamples:\n  engram data show data/mine 17\n  engram data show data/mine 17 --ids")
@click.argument("store")
@click.argument("number", type=click.IntRange(min=1))
@click.option("--ids", is_flag=True, help="Print token ids instead.")
@_TOKENIZER
def show(store: str, number: int, ids: bool, tokenizer: str | None) -> None:
    """Print a document of STORE as text. Documents count from 1."""
    from train.errors import UserError

    opened = _open(store, tokenizer)
    if number > opened.num_documents:
        raise UserError(f"{store}: has {opened.num_documents:,} documents, there is no number {number:,}")
    begin, end = opened.document_offsets[number - 1 : number + 1]
    tokens = opened.tokens[begin:end].tolist()
    click.echo(" ".join(map(str, tokens)) if ids else opened.tokenizer().decode(tokens))
