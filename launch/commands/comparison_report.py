"""Compared runs, for people and for programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from train.report.comparison import Contender, Spread

_LOSS, _BITS = "val_loss", "val_bits_per_byte"


def show(found: list[Contender], console: Console, step: int | None = None) -> None:
    """Prints a line for each contender; from the second on, with the gap to the first.

    `step` is the one that they are compared at; None for the end of each.
    """
    first = found[0]
    at = "" if step is None else f" after step {step:,}, which all have reached"
    title = f"Validation loss{at}, nats/token: mean (lowest to highest)"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    for heading in ("seeds", "parameters", "active", "in tables", "loss", f"to {first.name}", "bits/byte"):
        table.add_column(heading, justify="right", overflow="fold")
    for each in found:
        gap = each.gap(_LOSS, first)
        table.add_row(
            each.name,
            str(len(each.runs)),
            *(_count(each.figure(key)) for key in ("parameters", "active_parameters", "table_parameters")),
            _spread(each.spread(_LOSS), ".4f"),
            _spread(gap, "+.4f"),
            f"{bits.mean:.4f}" if (bits := each.spread(_BITS)) else "",
        )
    console.print(table)


def as_dict(found: list[Contender], step: int | None = None) -> dict[str, Any]:
    """The same as a JSON object, with the loss of every run."""
    return {"step": step, "runs": [_contender(each, found[0]) for each in found]}


def _contender(each: Contender, first: Contender) -> dict[str, Any]:
    gap = each.gap(_LOSS, first)
    return {
        "name": each.name,
        **{key: each.figure(key) for key in ("parameters", "active_parameters", "table_parameters", "tokens")},
        **{key: spread._asdict() if (spread := each.spread(key)) else None for key in (_LOSS, _BITS)},
        "val_loss_to_first": gap._asdict() if gap else None,
        "val_loss_by_seed": {seed: run.figures[_LOSS] for seed, run in each.runs.items()},
    }


def _count(number: int | None) -> str:
    """In a few characters; --json has all of them."""
    if number is None or number < 10**6:
        return "" if number is None else f"{number:,}"
    return f"{number / 1e6:,.1f}M" if number < 10**9 else f"{number / 1e9:,.2f}B"


def _spread(value: Spread | None, form: str) -> str:
    if value is None:
        return ""
    mean, least, most = (format(part, form) for part in value)
    return mean if value.least == value.most else f"{mean} ({least} to {most})"
