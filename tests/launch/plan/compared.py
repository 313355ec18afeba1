"""A case of `tests.launch.plan.predictions`: what was predicted of it, what was measured, and whether they agree."""

import re
from collections.abc import Sequence
from typing import NamedTuple

STEP, STALL, MEMORY = 0.15, 0.05, 0.10
"""The goals: of the measured step, of the measured step again, of the measured memory."""
_HEADS = (
    "| shape | link | ranks | step, predicted | measured | off | stall, predicted | measured | off, of the step "
    "| memory, predicted | measured | off | other work |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


class Case(NamedTuple):
    """A job of a shape, behind an emulated link, on some ranks."""

    shape: str
    link: str
    ranks: int

    def __str__(self) -> str:
        return f"{self.shape},{self.link},{self.ranks}"

    def named(self, name: str) -> bool:
        """Whether `name` gives the case's first parts."""
        return f"{self},".startswith(f"{name},")


class Found(NamedTuple):
    """Milliseconds of a step and of its stall; MiB of a rank."""

    step: float
    stall: float
    memory: float


class Compared(NamedTuple):
    """A case's two, and the share of the machine's cores that other work took while it was measured, if known."""

    case: Case
    says: Found
    took: Found
    others: float | None = None

    @property
    def off(self) -> tuple[float, float, float]:
        """By how much step, stall and memory are off, as shares of the measured step, step and memory."""
        says, took = self.says, self.took
        return says.step / took.step - 1, (says.stall - took.stall) / took.step, says.memory / took.memory - 1

    @property
    def within(self) -> tuple[bool, bool, bool]:
        """Which of the three goals are met."""
        step, stall, memory = map(abs, self.off)
        return step <= STEP, stall <= STALL, memory <= MEMORY

    @property
    def met(self) -> bool:
        """Whether all are."""
        return all(self.within)

    def row(self) -> str:
        """Of Markdown."""
        units = ("ms", "ms", "MiB")
        cells = (f"{says:.0f} {unit} | {took:.0f} {unit} | {off:+.0%}" for says, took, off, unit in
                 zip(self.says, self.took, self.off, units, strict=True))  # fmt: skip
        others = "?" if self.others is None else f"{self.others:.0%}"
        return f"| {self.case.shape} | {self.case.link} | {self.case.ranks} | {' | '.join(cells)} | {others} |"


def told(rows: Sequence[Compared]) -> list[str]:
    """How many cases meet each goal, and which do not."""
    goals = (f"step ({STEP:.0%})", f"stall ({STALL:.0%} of the step)", f"memory ({MEMORY:.0%})")
    lines = []
    for number, goal in enumerate(goals):
        missed = [f"{row.case} {row.off[number]:+.0%}" for row in rows if not row.within[number]]
        lines.append(
            f"{goal}: {len(rows) - len(missed)} of {len(rows)} met" + "".join(f"; not {text}" for text in missed)
        )
    return lines


def table(rows: Sequence[Compared], cases: int) -> str:
    """Of Markdown, and which of the goals it meets."""
    missing = [f"* {cases - len(rows)} of {cases} cases were not run"] if len(rows) < cases else []
    return "\n".join([*_HEADS, *(row.row() for row in rows), "", *(f"* {line}" for line in told(rows)), *missing])


def written(page: str, mark: str) -> list[Compared]:
    """The rows of a table that `table` made and `page` has between marks of that name."""
    _, _, rest = page.partition(f"<!-- {mark} -->")
    found = []
    for line in rest.partition(f"<!-- /{mark} -->")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [float(match[1]) for cell in cells[3:] if (match := re.fullmatch(r"(\d+) (?:ms|MiB)", cell))]
        if len(numbers) == 6:
            case = Case(cells[0], cells[1], int(cells[2]))
            others = None if cells[-1] == "?" else float(cells[-1].rstrip("%")) / 100
            found.append(Compared(case, Found(*numbers[::2]), Found(*numbers[1::2]), others))
    return found
