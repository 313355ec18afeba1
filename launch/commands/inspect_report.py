"""What a memory does for a text, for people."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.use.inspection import UNKNOWN, LayerView, TokenView
from train.use.usage import UsedRow

_NGRAMS = 5


def show_tokens(views: Sequence[TokenView]) -> None:
    """For each token what comes next, with the memory and without, and a line for each layer."""
    console = Console(highlight=False)
    for view in views:
        console.print(Text.assemble((quoted(view.text), "bold"), "  next ", _next(view.likeliest_with, view.next_with)))
        console.print(Text(f"  without memory  {_next(view.likeliest_without, view.next_without)}", "dim"))
        for layer in view.layers:
            console.print(_layer(layer, console.width))


def _layer(layer: LayerView, width: int) -> Text:
    """A layer's line; where it is longer than `width`, an n-gram begins another with its counts."""
    shade = round(255 * (1 - layer.opening))
    line = Text.assemble(
        f"  layer {layer.layer}  gate ",
        (f"{layer.opening:.2f}", f"black on #ff{shade:02x}{shade:02x}"),
    )
    if layer.next_without is not None:
        line.append(f"  without it {layer.next_without:.3f}")
    used = line.cell_len
    for ngram in layer.ngrams:
        part = Text(f"  {quoted(ngram.text)} ")
        part.append(" ".join("?" if count == UNKNOWN else str(count) for count in ngram.counts), "dim")
        if used + part.cell_len > width:
            line.append("\n    ")
            used = 4
        line.append(part)
        used += part.cell_len
    return line


def _next(likeliest: Sequence[tuple[str, float]], of_text: float | None) -> str:
    told = _likeliest(likeliest)
    return told if of_text is None else f"{told}; the text's {of_text:.3f}"


def _likeliest(tokens: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{quoted(text)} {share:.3f}" for text, share in tokens)


def show_used(rows: Sequence[UsedRow]) -> None:
    """A table of the most used rows."""
    table = Table(title="Most used rows", title_justify="left", box=None, pad_edge=False)
    for heading in ("layer", "order", "head", "row", "lookups", "updates"):
        table.add_column(heading, justify="right")
    table.add_column("n-grams behind it", overflow="fold")
    for row in rows:
        told = [f"{quoted(text)} {times}" for text, times in row.ngrams[:_NGRAMS]]
        more = [f"and {len(row.ngrams) - _NGRAMS} more"] if len(row.ngrams) > _NGRAMS else []
        count = "?" if row.count == UNKNOWN else str(row.count)
        numbers = map(str, (row.layer, row.order, row.head, f"{row.row:,}", f"{row.lookups:,}", count))
        table.add_row(*numbers, Text(", ".join([*told, *more])))
    Console(highlight=False).print(table)


def quoted(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
    return repr(text)
