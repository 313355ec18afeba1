"""The sums of gather's backward once more, part by part, from lists."""

from collections.abc import Sequence
from typing import Any


def one_by_one(parts: Sequence[Any]) -> Any:
    """The sum of tensors or arrays, from zero."""
    total = 0.0
    for part in parts:
        total = total + part
    return total


def chunked_sum(parts: Sequence[Any], size: int = 32) -> Any:
    """In chunks of 32, one by one; the chunks' sums in groups of 128, one by one, until there is one."""
    while True:
        parts = [one_by_one(parts[start : start + size]) for start in range(0, len(parts), size)]
        if len(parts) == 1:
            return parts[0]
        size = 128
