"""Tables of what traces of training steps say."""

from collections.abc import Sequence
from pathlib import Path

from launch.bench.report import Cell, Section
from launch.bench.trace import TraceSummary, read_trace, summarise
from train.errors import UserError

_SUFFIXES = (".gz", ".json")


def trace_sections(paths: Sequence[Path], steps: int | None = None) -> dict[str, Section]:
    """A row for each trace, and the kernels that took longest in each; nothing without traces.

    A trace that cannot be read, or shows no GPU, is named with the reason.

    Args:
        paths: of the traces.
        steps: that each shows; None for what they say themselves.
    """
    rows: list[dict[str, Cell]] = []
    kernels: list[dict[str, Cell]] = []
    for path in paths:
        name = _name(path)
        try:
            summary = summarise(read_trace(path), steps)
        except UserError as error:
            rows.append(_row(name, None, str(error)))
            continue
        rows.append(_row(name, summary, "measured"))
        kernels += [
            {"trace": name, "kernel": kernel.name, "ms": kernel.ms, "launches": kernel.launches}
            for kernel in summary.kernels
        ]
    sections = {"traces": Section("Steps as the profiler saw them", rows, notes=_NOTES)} if rows else {}
    if kernels:
        sections["kernels"] = Section("What took the GPU longest, a step", kernels)
    return sections


_NOTES = [
    "times in ms a step, numbers a step; the longest gap is one gap. Recording slows the host down a little",
    "hidden: share of the time that rows travelled, in or out, during which the GPU computed on another stream",
    "idle: the GPU had nothing to compute between the first and the last work of the steps",
    "waits: calls in which a thread of the host waits for the GPU",
]


def _row(name: str, summary: TraceSummary | None, status: str) -> dict[str, Cell]:
    columns = (
        *("step_ms", "computing_ms", "idle_ms", "longest_gap_ms", "fetch_ms", "write_back_ms"),
        *("fetch_hidden", "write_back_hidden", "launches", "waits", "waiting_ms", "copies_to_host"),
    )
    found = {column: getattr(summary, column) if summary else None for column in columns}
    return {"trace": name, **found, "status": status}


def _name(path: Path) -> str:
    while path.suffix in _SUFFIXES:
        path = path.with_suffix("")
    return path.name
