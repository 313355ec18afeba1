"""What a part of the benchmark found: a table for people, the same numbers as JSON for programs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from train.hardware import describe_machine

Cell = str | int | float | Spread | None


@dataclass(frozen=True)
class Measure:
    """A number that must not exceed its limit or, with `at_least`, must reach it."""

    name: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the number is within its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        met, bound = "met" if self.met else "NOT MET", "at least" if self.at_least else "at most"
        return f"{met}: {self.name}: {self.value:.3g} ({bound} {self.limit:.3g})"


@dataclass(frozen=True)
class Section:
    """A part's results.

    Attributes:
        title: what was measured.
        rows: by column; every row has the same columns, in the same order. Columns name their units; what is
            measured several times is a `Spread`.
        measures: what the rows are judged by.
        notes: what a reader has to know to read the rows.
    """

    title: str
    rows: list[dict[str, Cell]]
    measures: list[Measure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The section as a JSON object."""
        rows = [
            {name: asdict(cell) if isinstance(cell, Spread) else cell for name, cell in row.items()}
            for row in self.rows
        ]
        measures = [asdict(measure) | {"met": measure.met} for measure in self.measures]
        return {"title": self.title, "rows": rows, "measures": measures, "notes": self.notes}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        rows: list[dict[str, Cell]] = [
            {name: Spread(**cell) if isinstance(cell, dict) else cell for name, cell in row.items()}
            for row in saved["rows"]
        ]
        fields = ("name", "value", "limit", "at_least")
        measures = [Measure(**{field: measure[field] for field in fields}) for measure in saved["measures"]]
        return cls(saved["title"], rows, measures, saved["notes"])

    def joined(self, other: Self) -> Self:
        """Both sections' rows and measures under one title."""
        return type(self)(self.title, self.rows + other.rows, self.measures + other.measures, self.notes)

    def show(self, console: Console) -> None:
        """Prints the section."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        for number, heading in enumerate(_headings(self.rows)):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*(text for cell in row.values() for text in _texts(cell)))
        console.print(table)
        for line in (*self.notes, *map(str, self.measures)):
            console.print(f"  {line}", markup=False, soft_wrap=not console.is_terminal)
        console.print()


def answer(sections: dict[str, Section], options: BenchOptions) -> dict[str, Any]:
    """Everything that was measured, and how, as a JSON object."""
    return {
        "machine": describe_machine(options.threads),
        "options": options.to_json(),
        "parts": {name: section.to_json() for name, section in sections.items()},
    }


def _headings(rows: list[dict[str, Cell]]) -> Iterator[str]:
    for name in rows[0]:
        yield name.replace("_", " ")


def _texts(cell: Cell) -> Iterator[str]:
    if isinstance(cell, Spread):
        yield f"{_number(cell.median)} ({_number(cell.p10)} to {_number(cell.p90)})"
    elif isinstance(cell, float):
        yield _number(cell)
    elif isinstance(cell, int):
        yield f"{cell:,}"
    else:
        yield escape(cell or "")


def _number(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
