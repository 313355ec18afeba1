"""What a stretch of virtual time was spent on: from its end back, each span to the one whose end let it begin."""

from collections import Counter
from collections.abc import Iterator

from tests.emulation.clock import Span
from tests.emulation.hardware import CARRIED_IN, CARRIED_OUT, FETCH, MODEL, OPTIMIZER, STAGING, WRITE_BACK

INTERFERENCE = "interference"
KINDS = {
    "launches": "launches",
    MODEL: "model",
    OPTIMIZER: "backbone's optimizer",
    "loop": "loop's own work",
    "engram-window": "window's thread",
    "engram-plan": "planner",
    **dict.fromkeys((FETCH, CARRIED_IN), "rows in"),
    **dict.fromkeys((WRITE_BACK, CARRIED_OUT), "rows out"),
    **dict.fromkeys(STAGING, "staging threads"),
    "rows": "rows read, updated",
    "exchange": "exchange",
    "numbers": "numbers sent",
}
"""What spans are counted as."""


def spans_back(last: Span) -> Iterator[Span]:
    """The span and its causes, the latest first."""
    span: Span | None = last
    while span is not None:
        yield span
        span = span.cause


def critical_path(last: Span, since: float) -> Counter[str]:
    """Seconds by kind of work between `since` and the end of `last`; their sum is that time.

    What a span of the model takes longer than alone counts as interference.
    """
    seconds: Counter[str] = Counter()
    for span in spans_back(last):
        if span.end <= since:
            break
        spent = span.end - max(span.start, since)
        kind = KINDS.get(span.what, span.what)
        if span.what == MODEL:
            alone = spent * span.alone / (span.end - span.start)
            seconds[INTERFERENCE] += spent - alone
            spent = alone
        seconds[kind] += spent
    return seconds
