"""Tables of what traces of training steps show."""

from collections.abc import Sequence
from pathlib import Path

from launch.bench.report import Cell, Section
from launch.bench.trace.trace import TraceSummary, read_trace, summarise
from train.errors import UserError

_SUFFIXES = (".gz", ".json")


def trace_sections(paths: Sequence[Path], steps: int | None = None) -> dict[str, Section]:
    """A column for each trace, and the kernels that took longest in each; nothing without traces.

    A trace that cannot be read, or shows no GPU, is named with the reason in the notes.

    Args:
        paths: of the traces.
        steps: how many each shows; None for what they say themselves.
    """
    found: dict[str, TraceSummary] = {}
    unusable = []
    for path in paths:
        try:
            found[_name(path)] = summarise(read_trace(path), steps)
        except UserError as error:
            unusable.append(f"{_name(path)}: {error}")
    if not found and not unusable:
        return {}
    rows: list[dict[str, Cell]] = [
        {"of_a_step": what, **{name: getattr(summary, field) for name, summary in found.items()}}
        for field, what in _FIELDS.items()
    ]
    rows = rows if found else [{"of_a_step": "no trace shows the work of a GPU"}]
    sections = {"traces": Section("Steps as the profiler saw them", rows, notes=[*unusable, *_NOTES])}
    kernels: list[dict[str, Cell]] = [
        {"trace": name, "kernel": kernel.name, "ms": kernel.ms, "launches": kernel.launches}
        for name, summary in found.items()
        for kernel in summary.kernels
    ]
    return sections | ({"longest": Section("What took the GPU longest, a step", kernels)} if kernels else {})


_FIELDS = {
    "step_ms": "from first to last work, ms",
    "computing_ms": "the GPU computed, ms",
    "idle_ms": "it had nothing to compute, ms",
    "longest_gap_ms": "longest such gap, ms (one, not a step's)",
    "fetch_ms": "rows on their way in, ms",
    "write_back_ms": "rows on their way out, ms",
    "fetch_hidden": "of the way in, under computation",
    "write_back_hidden": "of the way out, under computation",
    "launches": "kernels launched",
    "waits": "waits of the host for the GPU",
    "waiting_ms": "their time, all threads, ms",
    "copies_to_host": "copies to the host between computations",
}
_NOTES = ["recording slows the host down a little; rows travel on streams of their own, beside the computation's"]


def _name(path: Path) -> str:
    while path.suffix in _SUFFIXES:
        path = path.with_suffix("")
    return path.name
