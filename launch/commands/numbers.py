"""Numbers as values of options: several, large ones, sizes of files, finite ones, seeds."""

import math
import re
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


_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class FileSize(click.ParamType):
    """A size such as 5GB or 500MB, in bytes."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes of `value`."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", value.strip().upper())
        size = int(float(match[1]) * _BYTES[match[2]]) if match else 0
        if size <= 0:
            self.fail(f"{value!r} is no size; give one such as 5GB or 500MB.", param, ctx)
        return size


class Finite(click.FloatRange):
    """A number in a range, and none of NaN and infinity, which Python's comparisons let through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Reads an option's value; click calls it."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


SEED = click.IntRange(min=0, max=2**63 - 1)
"""What random generators take."""
