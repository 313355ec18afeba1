"""What the loop and the threads beside it are at work on, for a profile: recorded only while somebody wants it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

Lane = Literal["loop", "plan", "fetch", "write back"]


class Span(NamedTuple):
    """Work of a kind, from when to when, in nanoseconds since 1970."""

    lane: Lane
    name: str
    started_ns: int
    ended_ns: int


_recorded: list[Span] | None = None


def record_spans() -> None:
    """From now on all spans of this process are kept."""
    global _recorded
    _recorded = []


def take_spans() -> list[Span]:
    """Those that have ended since `record_spans`; no more are kept."""
    global _recorded
    spans, _recorded = _recorded or [], None
    return spans


@contextmanager
def span(lane: Lane, name: str | None = None) -> Iterator[None]:
    """Around the work, in any thread; it is called by its lane, unless it has a name."""
    recorded = _recorded
    if recorded is None:
        yield
        return
    started_ns = time.time_ns()
    yield
    recorded.append(Span(lane, name or lane, started_ns, time.time_ns()))
