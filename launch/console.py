"""Tables, lines and numbers for people, no wider than the console."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def open_console(width: int) -> Console:
    """Standard output: `width` columns, fewer on a narrower terminal."""
    console = Console(highlight=False)
    return Console(highlight=False, width=min(width, console.width) if console.is_terminal else width)


def table_of(title: str, first: str, *others: str) -> Table:
    """An empty table, whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def print_lines(console: Console, *lines: str) -> None:
    """Lines, each wrapped to the console's width, and an empty one."""
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print()


def count_text(number: float) -> str:
    """A count in the largest unit that it fills, such as `5.24M`."""
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(round(number))


def seconds_text(seconds: float) -> str:
    """A time in the unit that it fills, such as `1.31 s`."""
    for size, unit in ((86400, "days"), (3600, "h"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} us"
