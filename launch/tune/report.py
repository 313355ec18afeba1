"""A tuning for people: a table, the recommendation, a plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.console import print_lines, table_of
from launch.plan.rows.traffic import DEPTHS
from launch.plotting import plots
from launch.tune.points import Point
from launch.tune.results import Results
from launch.tune.verdict import Line, lines, notes, reasons
from offload.host.limits import size_text
from train.config import yaml_text

PLOT_FILE = "tune.png"
"""Name of the plot in a tuning's folder."""

_COLUMNS: dict[str, Callable[[Line], str]] = {
    "depth": lambda line: str(line.point.depth),
    "window": lambda line: f"{line.point.window_rows:,}",
    "engine": lambda line: line.point.engine,
    "programs": lambda line: "" if line.point.programs is None else str(line.point.programs),
    "threads": lambda line: str(line.point.planner_threads),
    "turns": lambda line: str(line.turns),
    "step, ms": lambda line: f"{line.step_ms.median:.1f} ({line.step_ms.p10:.1f} to {line.step_ms.p90:.1f})",
    "stall": lambda line: f"{line.stall_ms:.1f}",
    "hits": lambda line: f"{line.hit_rate:.0%}",
    "device": lambda line: size_text(line.device_bytes),
    "host": lambda line: size_text(line.host_bytes),
}
_IF_VARIED = ("engine", "programs", "threads")


def show(results: Results, changes: dict[str, Any], config: str, console: Console, *, written: bool) -> None:
    """Prints it all.

    Args:
        results: what was measured.
        changes: the settings to write.
        config: the job's file.
        console: where to.
        written: whether they were.
    """
    measured = lines(results)
    shown = [name for name in _COLUMNS if name not in _IF_VARIED or len(_values(measured, name)) > 1]
    table = table_of("Measured, fewest slots first", "", *shown)
    for point, line in measured.items():
        marks = ["->"] * (point == results.best) + ["configured"] * (point == results.start)
        table.add_row(" ".join(marks), *(_COLUMNS[name](line) for name in shown))
    console.print(table)
    print_lines(
        console,
        "step: median (10th to 90th percentile) of all timed steps; stall: ms a step that the slowest rank waits for "
        "rows; device: a rank's most on its GPU, without one its window; host: all ranks, freed memory included",
    )
    settings = " ".join(f"offload.{name}={yaml_text.render(value).strip()}" for name, value in changes.items())
    print_lines(
        console,
        f"recommended: {settings or 'the settings of the config as they are'}",
        *(f"because {reason}" for reason in reasons(results, measured)),
        *(f"note: {note}" for note in notes(results, measured)),
    )
    if changes:
        told = f"written to {config}" if written else f"engram tune {config} --write puts it into the file"
        console.print(told, soft_wrap=True)


def _values(measured: dict[Point, Line], name: str) -> set[str]:
    return {_COLUMNS[name](line) for line in measured.values()}


def draw(results: Results, title: str, file: Path) -> None:
    """Stall and memory over the look-ahead, a line for each window, as PNG.

    Raises:
        UserError: as `launch.plotting.plots`.
    """
    of_window: dict[int, list[Line]] = {}
    for point, line in lines(results).items():
        if (
            results.start is not None
            and point.build[1:] == results.start.build[1:]
            and line.point.planner_threads == results.start.planner_threads
        ):
            of_window.setdefault(point.window_rows, []).append(line)
    with plots(file, title, 1, 2, (9, 3.6)) as axes:
        for rows, found in sorted(of_window.items()):
            depths = [line.point.depth for line in found]
            axes[0].plot(depths, [line.stall_ms for line in found], "o-", label=f"{rows:,} slots")
            axes[1].plot(depths, [line.device_bytes / 2**20 for line in found], "o-", label=f"{rows:,} slots")
        axes[0].set(title="waiting for rows, ms a step", xlabel="look-ahead", ylim=(0, None))
        axes[1].set(title="device memory of a rank (no GPU: window), MiB", xlabel="look-ahead", ylim=(0, None))
        for axis in axes:
            axis.set_xticks(DEPTHS)
            axis.grid(visible=True, alpha=0.3)
        axes[0].legend()
