"""Several whole numbers as the value of one option."""

from typing import Any

import click


class NumberList(click.ParamType):
    """Whole numbers between commas, as a tuple, each once.

    Args:
        least: of each.
        most: of each; None for any.
        multiple_of: divides each.
    """

    name = "N,N,..."

    def __init__(self, least: int, most: int | None = None, multiple_of: int = 1) -> None:
        self._least, self._most, self._multiple_of = least, most, multiple_of

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Reads an option's value; click calls it. A number that is not fit is a usage error."""
        if isinstance(value, tuple):
            return value
        number = click.IntRange(self._least, self._most)
        found = tuple(dict.fromkeys(number.convert(part.strip(), param, ctx) for part in value.split(",")))
        for each in found:
            if each % self._multiple_of:
                self.fail(f"{each} is no multiple of {self._multiple_of}.", param, ctx)
        return found
