"""The figures of the page: which numbers of the runs each of them shows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from train.page.chart import Chart, Line, line_chart
from train.page.stacked import stacked_bars
from train.page.timeline import timeline
from train.page.told_run import ToldRun

_STAGES = ("plan", "fetch", "exchange", "forward", "backward", "reduce", "update", "other")


class Shown(NamedTuple):
    """A chart: its title, and what it shows by key of the records with what to call it."""

    title: str
    keys: dict[str, str]
    unit: str = ""
    scale: float = 1.0
    logarithmic: bool = False
    from_zero: bool = False


_LEARNING = (
    Shown("Learning rate", {"lr": ""}, from_zero=True),
    Shown("Gradient norm", {"grad_norm": ""}, "before clipping", logarithmic=True),
    Shown("Load of the busiest expert", {"experts.busiest": ""}, "times the mean's, least balanced layer"),
)
_SPEED = (
    Shown("Throughput", {"tokens_per_s": ""}, "tokens/s", from_zero=True),
    Shown("Model FLOPs utilisation", {"mfu": ""}, "%", 100.0, from_zero=True),
    Shown("Host memory", {"memory.host_bytes": ""}, "GiB, the largest rank", 2.0**-30, from_zero=True),
    Shown("Device memory", {"memory.device_peak_bytes": ""}, "GiB, peak, the largest rank", 2.0**-30, from_zero=True),
)
_OFFLOAD = (
    Shown("Hit rate", {"offload.hit_rate": ""}, "%", 100.0),
    Shown("Rows moved", {"offload.fetch_rows": "in", "offload.writeback_rows": "out"}, "a step", from_zero=True),
    Shown("Stall", {"offload.stall_ms": ""}, "ms a step", from_zero=True),
)


def sections(runs: Sequence[ToldRun]) -> Iterator[tuple[str, list[str]]]:
    """Headings with their figures; those with nothing to show are left out."""
    stages = [_stages(run) for run in runs]
    for heading, charts in line_charts(runs).items():
        yield heading, [*map(line_chart, charts), *(stages if heading == "Speed" else [])]
    yield "Timeline", [timeline(run.folder) for run in runs]


def line_charts(runs: Sequence[ToldRun]) -> dict[str, list[Chart]]:
    """The line charts by heading; some may be empty."""
    return {
        "Learning": [_loss(runs), *(_chart(shown, runs) for shown in _LEARNING)],
        "Speed": [_chart(shown, runs) for shown in _SPEED],
        "Tables": [*(_chart(shown, runs) for shown in (*_OFFLOAD, *_gates(runs))), _stall_by_depth(runs)],
    }


def _gates(runs: Sequence[ToldRun]) -> list[Shown]:
    layers = {layer for run in runs if run.job.model.engram for layer in run.job.model.engram.layers}
    told = {"mean": "mean", "open": "open by more than half"}
    return [
        Shown(
            f"Gates of layer {layer}", {f"gate.{layer}.{key}": name for key, name in told.items()}, "%", 100.0,
            from_zero=True
        )
        for layer in sorted(layers)
    ]  # fmt: skip


def _loss(runs: Sequence[ToldRun]) -> Chart:
    lines, marks = [], []
    for run in runs:
        validated = run.points("val_loss")
        lines.append(Line(f"{run.name} training", run.points("loss"), run.number, faint=bool(validated)))
        lines.append(Line(f"{run.name} validation", validated, run.number))
        marks += [
            (float(skip["step"]), f"{run.name}: step {skip['step']} skipped: {skip['why']}") for skip in run.skipped
        ]
    return Chart("Loss", lines, unit="nats/token; vertical lines: skipped steps", marks=marks)


def _chart(shown: Shown, runs: Sequence[ToldRun]) -> Chart:
    lines = [
        Line(f"{run.name} {told}".strip(), run.points(key, shown.scale), run.number, faint=bool(number))
        for run in runs
        for number, (key, told) in enumerate(shown.keys.items())
    ]
    return Chart(shown.title, lines, unit=shown.unit, logarithmic=shown.logarithmic, from_zero=shown.from_zero)


def _stages(run: ToldRun) -> str:
    keys = [f"stages.{stage}_ms" for stage in _STAGES]
    rows = [(record["step"], [record[key] for key in keys]) for record in run.records if keys[0] in record]
    return stacked_bars(f"A step's time: {run.name}", _STAGES, rows, unit="ms")


def _stall_by_depth(runs: Sequence[ToldRun]) -> Chart:
    """Only runs of several look-aheads show something."""
    points = sorted(
        (float(run.job.offload.depth), sorted(y for _, y in stalls)[len(stalls) // 2])
        for run in runs
        if (stalls := run.points("offload.stall_ms"))
    )
    lines = [Line("median", points if len({depth for depth, _ in points}) > 1 else [])]
    return Chart("Stall against look-ahead", lines, unit="ms a step", from_zero=True, x_name="offload.depth")
