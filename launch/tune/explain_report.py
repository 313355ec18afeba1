"""What a run spends its time on, for people."""

from rich.console import Console

from launch.console import print_lines, table_of
from launch.tune.explain import STAGES, Explained

_NAMES = {
    "plan": "waiting for plans",
    "fetch": "waiting for rows",
    "exchange": "exchange of rows",
    "forward": "forward",
    "backward": "backward",
    "reduce": "reducing gradients",
    "update": "update",
    "other": "between steps",
}


def show(found: Explained, console: Console) -> None:
    """Prints the stages, then the bottleneck and what moves it."""
    first, last = found.steps
    table = table_of(f"{found.run}: a step, records of steps {first} to {last}", "stage", "ms", "share")
    for stage in STAGES:
        ms = found.stages_ms[stage]
        table.add_row(_NAMES[stage], f"{ms:.1f}", f"{ms / found.step_ms:.1%}")
    table.add_section()
    table.add_row("a step", f"{found.step_ms:.1f}", "")
    console.print(table)
    for number, finding in enumerate(found.findings):
        head = "bottleneck" if number == 0 else "then"
        settings = f"to move it: {'; '.join(finding.settings)}" if finding.settings else "no setting moves it"
        print_lines(console, f"{head}: {finding.stage}, {finding.share:.0%} of the step: {finding.text}", settings)
