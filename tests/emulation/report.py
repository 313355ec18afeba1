"""Emulated steps as text of at most 80 columns."""

from collections.abc import Mapping

from tests.emulation.critical_path import INTERFERENCE, KINDS
from tests.emulation.results import Run
from tests.emulation.workload import Workload

GOAL = 1.005
_LABEL, _CELL = 25, 11


def heading(config: str, machine: str, workload: Workload) -> str:
    """What is emulated."""
    part, size = workload.part, workload.size
    lines = [
        f"EMULATED: {config} on {machine} (launch/plan/hardware.yaml); nothing ran on a GPU.",
        f"{size.micro_batches} micro-batches a step of {size.launches:,} launches and {size.flops / 1e12:.3g} TFLOP; "
        f"records of {workload.record_bytes:,} bytes.",
        f"Tokens: {workload.text}.",
    ]
    if part.ranks > 1:
        lines.append(f"One of {part.ranks} ranks.")
    if part.scale > 1:
        lines.append(f"1/{part.scale} of a step was emulated; times and rows are multiplied by {part.scale}.")
    return "\n".join(lines)


def depths_table(resident: Run, runs: Mapping[int, Run], scale: int) -> str:
    """Each look-ahead beside the resident run: the step, the parts of its critical path, and what went on beside it."""
    columns = {"resident": resident} | {f"depth {depth}": run for depth, run in runs.items()}
    every = list(columns.values())

    def line(label: str, *cells: str) -> str:
        return label.ljust(_LABEL) + "".join(cell.rjust(_CELL) for cell in cells)

    def in_ms(label: str, *seconds: float) -> str:
        return line(label, *(f"{1e3 * scale * each:,.2f}" for each in seconds))

    def rows(label: str, *counts: float) -> str:
        return line(label, *(f"{scale * count:,.0f}" for count in counts))

    lines = [
        line("of a step, ms", *columns),
        in_ms("step", *(run.seconds for run in every)),
        in_ms("more than resident", *(run.seconds - resident.seconds for run in every)),
        line("times resident", *(f"{run.seconds / resident.seconds:.4f}" for run in every)),
        "its critical path:",
    ]
    for kind in dict.fromkeys([*KINDS.values(), INTERFERENCE]):
        if any(run.path[kind] > 0 for run in every):
            lines.append(in_ms(f"  {kind}", *(run.path[kind] for run in every)))
    lines += [
        "beside it:",
        in_ms("  stall of the loop", *(run.mean(lambda step: step.stall) for run in every)),
        in_ms("  copies under way", *(run.mean(lambda step: step.copied) for run in every)),
        rows("  rows used", *(run.mean(lambda step: step.rows) for run in every)),
        rows("  rows in", *(run.mean(lambda step: step.fetched) for run in every)),
        rows("  rows out", *(run.mean(lambda step: step.written) for run in every)),
    ]
    different = [name for name, run in columns.items() if run.norms != resident.norms]
    lines.append(f"gradient norms of other bits than resident: {', '.join(different) or 'none'}")
    best = min(run.seconds for run in runs.values()) / resident.seconds
    lines.append(
        f"goal, at most {GOAL} times resident, in emulation: {'met' if best <= GOAL else 'not met'} ({best:.4f})"
    )
    return "\n" + "\n".join(lines)


def variants_table(pairs: Mapping[str, tuple[Run, Run]], depth: int, scale: int) -> str:
    """Changes of the code: resident and window, both changed."""
    title = f"at depth {depth}, ms".ljust(33)
    lines = [title + "".join(name.rjust(_CELL) for name in ("resident", "window", "more", "times"))]
    for name, (resident, window) in pairs.items():
        seconds = resident.seconds, window.seconds, window.seconds - resident.seconds
        cells = [f"{1e3 * scale * each:,.2f}" for each in seconds]
        cells.append(f"{window.seconds / resident.seconds:.4f}")
        lines.append(name.ljust(33) + "".join(cell.rjust(_CELL) for cell in cells))
    return "\n" + "\n".join(lines)
