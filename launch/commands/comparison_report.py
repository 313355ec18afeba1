"""Compared runs, for people and for programs."""

from typing import Any

from rich.console import Console
from rich.table import Table

from train.report.comparison import Contender, Spread

_LOSS, _BITS = "val_loss", "val_bits_per_byte"


def show(found: list[Contender], console: Console) -> None:
    """Prints a line for each contender; from the second on, with the gap to the first."""
    first = found[0]
    table = Table(title="Validation loss, nats/token: mean (lowest to highest)", title_justify="left")
    table.add_column("run")
    for heading in ("seeds", "parameters", "active", "in tables", "loss", f"to {first.name}", "bits/byte"):
        table.add_column(heading, justify="right")
    for each in found:
        gap = each.gap(_LOSS, first)
        table.add_row(
            each.name,
            str(len(each.runs)),
            f"{each.figure('parameters'):,}",
            f"{each.figure('active_parameters'):,}",
            f"{each.figure('table_parameters'):,}",
            _spread(each.spread(_LOSS), ".4f"),
            _spread(gap, "+.4f") if gap else "",
            f"{each.spread(_BITS).mean:.4f}",
        )
    console.print(table)


def as_dict(found: list[Contender]) -> dict[str, Any]:
    """The same as a JSON object, with the loss of every run."""
    return {"runs": [_contender(each, found[0]) for each in found]}


def _contender(each: Contender, first: Contender) -> dict[str, Any]:
    gap = each.gap(_LOSS, first)
    return {
        "name": each.name,
        **{key: each.figure(key) for key in ("parameters", "active_parameters", "table_parameters", "tokens")},
        _LOSS: each.spread(_LOSS)._asdict(),
        _BITS: each.spread(_BITS)._asdict(),
        "val_loss_to_first": gap._asdict() if gap else None,
        "val_loss_by_seed": {seed: run.figures[_LOSS] for seed, run in each.runs.items()},
    }


def _spread(value: Spread, form: str) -> str:
    mean, least, most = (format(part, form) for part in value)
    return mean if value.least == value.most else f"{mean} ({least} to {most})"
