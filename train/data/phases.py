"""Where a run's phases begin, from its config alone."""

from collections.abc import Iterator
from typing import NamedTuple

from train.data.config import DataConfig, MixSource


class Begin(NamedTuple):
    """A phase as the config has it."""

    first: int
    """Number of its first batch, from 0."""
    length: int
    """Tokens of a sequence."""
    mix: list[MixSource]
    """Empty for data without a mixture."""


def begun_at(data: DataConfig, batch: int) -> list[Begin]:
    """The phases of a run whose steps take `batch` sequences: what a phase does not set stays as it was.

    One that begins after a number of tokens begins with the first batch before which as many were read.

    Raises:
        ValueError: a phase begins no later than the one before it.
    """
    found = [Begin(0, data.sequence_length, data.first_mix)]
    tokens = 0  # read before the last of them
    for number, phase in enumerate(data.phases):
        before = found[-1]
        size = before.length * batch
        if phase.after_steps is not None:
            first = phase.after_steps
        else:
            assert phase.after_tokens is not None
            first = before.first + -(-(phase.after_tokens - tokens) // size)
        if first <= before.first:
            raise ValueError(
                f"data.phases: phase {number + 2} begins no later than the one before it, which begins with step "
                f"{before.first + 1}, after {tokens:,} tokens"
            )
        tokens += (first - before.first) * size
        found.append(Begin(first, phase.sequence_length or before.length, phase.mix or before.mix))
    return found


def spans(data: DataConfig, batch: int, steps: int) -> Iterator[tuple[int, int]]:
    """For each phase that `steps` steps come to, how many of them it has, and its tokens a sequence."""
    begins = [begin for begin in begun_at(data, batch) if begin.first < steps]
    ends = [begin.first for begin in begins[1:]] + [steps]
    for begin, end in zip(begins, ends, strict=True):
        yield end - begin.first, begin.length
