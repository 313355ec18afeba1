"""Several whole numbers, or a large one, as the value of one option."""

from typing import Any

import click


class NumberList(click.ParamType):
    """Whole numbers separated by commas, as a tuple, each once.

    Args:
        least: of each.
        most: of each; None for any.
        multiple_of: divides each.
    """

    name = "N,N,..."

    def __init__(self, least: int, most: int | None = None, multiple_of: int = 1) -> None:
        self._least, self._most, self._multiple_of = least, most, multiple_of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Reads an option's value; click calls it. An unfit number is a usage error."""
        if isinstance(value, tuple):
            return value
        number = click.IntRange(self._least, self._most)
        found = tuple(dict.fromkeys(number.convert(part.strip(), param, ctx) for part in value.split(",")))
        for each in found:
            if each % self._multiple_of:
                self.fail(f"{each} is no multiple of {self._multiple_of}.", param, ctx)
        return found


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class UnitNumber(click.ParamType):
    """A whole number, or one with a unit: 300B, 1.5T."""

    name = "N[K|M|B|T]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads an option's value; click calls it."""
        text = str(value).strip().upper()
        unit = _UNITS.get(text[-1:], 1)
        try:
            number = float(text.rstrip("KMBT").replace("_", "")) * unit
        except ValueError:
            self.fail(f"{value!r} is no number of tokens, such as 300B or 1T.", param, ctx)
        if not 1 <= number <= 1e18:
            self.fail(f"{value!r} is not between 1 and 10^18 tokens.", param, ctx)
        return round(number)
