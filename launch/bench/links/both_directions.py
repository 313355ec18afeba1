"""How much time is lost when records travel both ways at once, for copy engines and for kernels."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch

from kernels.records import fetch_records, write_records
from launch.bench.clock import Run, clock_of
from launch.bench.deadline import Deadline
from launch.bench.host_link import HostLink
from launch.bench.measure import Spread

_RECORD_BYTES = 1024  # of a padded record of Adam's
_SECONDS = 0.03


class _Pair(NamedTuple):
    """One run for each direction. `record_bytes`: None for one piece; `nbytes`: moved by each run."""

    record_bytes: int | None
    nbytes: int
    fetch: Run
    write: Run


class BothWays(NamedTuple):
    """What was measured; None where there was no time to."""

    record_bytes: int | None
    """Of a record; None for one piece."""
    rate: Spread | None = None
    """GB/s of both directions together."""
    lost: float | None = None
    """Share of the time: 0 where both directions take as long as the slower of the two alone."""


def both_at_once(link: HostLink, copied: int, deadline: Deadline) -> dict[str, BothWays]:
    """Times copy engines and kernels on two streams, beside each direction alone. `copied`: bytes of a copy."""
    pairs = {"copy engines": _engines(link, copied), "kernels": _kernels(link, copied)}
    return {what: _measure(link, pair, deadline) for what, pair in pairs.items()}


def _engines(link: HostLink, copied: int) -> _Pair:
    half = copied // 4
    fetch = partial(link.device_N[:half].copy_, link.host_N[:half], non_blocking=True)
    write = partial(link.host_N[half : 2 * half].copy_, link.device_N[half : 2 * half], non_blocking=True)
    return _Pair(None, copied, fetch, write)


def _kernels(link: HostLink, copied: int) -> _Pair:
    words, count = _RECORD_BYTES // 4, copied // _RECORD_BYTES
    host_RW, window_CW = link.host_records(words), link.device_records(words)
    # Each direction has rows and slots of its own.
    rows_U = link.draw_rows(2 * count, words, ordered=False)
    slots_U = link.draw_slots(2 * count)
    fetch = partial(fetch_records, host_RW, rows_U[:count].sort().values, window_CW, slots_U[:count])
    write = partial(write_records, window_CW, slots_U[count:], host_RW, rows_U[count:].sort().values)
    return _Pair(_RECORD_BYTES, count * _RECORD_BYTES, fetch, write)


def _measure(link: HostLink, pair: _Pair, deadline: Deadline) -> BothWays:
    if not deadline.allows(0):
        return BothWays(pair.record_bytes)
    clock = clock_of(link.device, _SECONDS)
    alone = [clock.time(run).median for run in (pair.fetch, pair.write)]
    taken = clock.time(_on_two_streams(pair.fetch, pair.write))
    together = Spread(*(2 * pair.nbytes / 1e6 / ms for ms in (taken.median, taken.p90, taken.p10)))
    ideal = sum(pair.nbytes / 1e6 / ms for ms in alone)
    return BothWays(pair.record_bytes, together, 1 - together.median / ideal)


def _on_two_streams(one: Run, other: Run) -> Run:
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def run() -> None:
        current = torch.cuda.current_stream()
        for stream, work in zip(streams, (one, other), strict=True):
            stream.wait_stream(current)
            _within(torch.cuda.stream(stream), work)
        for stream in streams:
            current.wait_stream(stream)

    return run


def _within(context: AbstractContextManager[object], work: Callable[[], object]) -> None:
    with context:
        work()
