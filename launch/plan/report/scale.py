"""What grows with a job's ranks, as tables for people and as plots."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from launch.console import count_text, seconds_text, table_of
from launch.plan.scale import Point
from launch.plotting import plots
from offload.host.limits import size_text

COLUMNS: dict[str, Callable[[Point], str]] = {
    "ranks": lambda point: f"{point.ranks:,}",
    "tokens": lambda point: count_text(point.tokens),
    "shard": lambda point: size_text(point.shard_bytes),
    "rows of a step": lambda point: count_text(point.owned),
    "of shard": lambda point: f"{point.used:.0%}",
    "hits": lambda point: f"{point.hit_rate:.0%}",
    "busiest/mean": lambda point: f"{point.imbalance:.2f}",
    "sent": lambda point: size_text(round(point.exchange_bytes)),
    "plan": lambda point: seconds_text(point.plan_seconds),
    "exchange": lambda point: seconds_text(point.exchange_seconds),
}
"""What tables may show of a point; times are estimates."""
_NARROW = ("ranks", "tokens", "shard", "rows of a step", "of shard", "hits", "busiest/mean", "sent", "plan")


def show_scale(points: Sequence[Point], console: Console) -> None:
    """Prints one table per batch; `engram plan --json` has all numbers."""
    for batch in dict.fromkeys(point.batch for point in points):
        table = table_of(f"With a {batch} batch, the busiest sampled rank", *_NARROW)
        for point in points:
            if point.batch == batch:
                table.add_row(*(COLUMNS[name](point) for name in _NARROW))
        console.print(table)


def draw(points: Sequence[Point], title: str, file: Path) -> None:
    """Four plots over the number of ranks, as PNG or SVG by the file's name.

    Raises:
        UserError: as `launch.plotting.plots`.
    """
    panels: dict[str, Callable[[Point], float]] = {
        "rows of a step that the busiest rank owns": lambda point: point.owned,
        "share of its shard that a step uses": lambda point: point.used,
        "bytes of rows that a rank sends": lambda point: point.exchange_bytes,
        "bytes of a rank's shard": lambda point: float(point.shard_bytes),
    }
    with plots(file, title, 2, 2, (9, 6)) as axes:
        for axis, (label, of) in zip(axes.flat, panels.items(), strict=True):
            for batch, marker in (("fixed", "o-"), ("growing", "s--")):
                mine = [point for point in points if point.batch == batch]
                axis.plot(
                    [point.ranks for point in mine], [of(point) for point in mine], marker, label=f"{batch} batch"
                )
            axis.set(title=label, xlabel="ranks", xscale="log", yscale="linear" if "share" in label else "log")
            axis.grid(visible=True, alpha=0.3)
        axes[0, 0].legend()
