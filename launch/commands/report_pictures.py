"""The line charts of `engram report` as PNG files beside its page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.plotting import plots
from train.page.chart import Chart
from train.page.figures import line_charts
from train.page.told_run import ToldRun


def write_pictures(runs: Sequence[ToldRun], page: Path) -> list[Path]:
    """Writes `PAGE-loss.png`, `PAGE-throughput.png`, ..., and returns them.

    Raises:
        UserError: matplotlib is not installed, or a file cannot be written.
    """
    return list(_written(runs, page))


def _written(runs: Sequence[ToldRun], page: Path) -> Iterator[Path]:
    for charts in line_charts(runs).values():
        for chart in charts:
            if not chart.empty:
                name = chart.title.lower().replace(" ", "-")
                file = page.with_name(f"{page.stem}-{name}.png")
                _draw(chart, file)
                yield file


def _draw(chart: Chart, file: Path) -> None:
    with plots(file, chart.title, 1, 1, (7, 4)) as axes:
        for line in chart.lines:
            xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
            few = {"marker": "."} if len(xs) <= 30 else {}
            axes.plot(xs, ys, f"C{line.colour}", alpha=0.45 if line.faint else 1.0, label=line.name, **few)
        for place, _ in chart.marks:
            axes.axvline(place, color="0.6", linewidth=0.8)
        if chart.spans_decades:
            axes.set_yscale("log")
        elif chart.from_zero:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=chart.x_name, ylabel=chart.unit)
        axes.grid(alpha=0.3)
        if len(chart.lines) > 1:
            axes.legend()
