"""Traces of several ranks in one: ranks are processes, and what a step consists of has lanes with names.

The form is Chrome's trace event format, as PyTorch's profiler writes it, microseconds.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from kernels.carriers import CARRIERS
from offload.spans import Span
from train.report.intervals import union

TRACE_FILE = "trace.json.gz"
"""Name of the file in a run's folder."""
LANE = "engram"
"""Category of the events in lanes of our own."""
LANES = ("loop", "plan", "fetch", "exchange", "compute", "write back")
"""In the order in which they are shown. `loop` has what the training loop is in, so that its `plan` and `fetch` are
waiting; the others have the work itself, wherever it is done. On a GPU, `exchange` has NCCL's kernels, and `compute`
all that carry neither rows nor messages."""
STEPS_KEY = "engram_steps"
"""Of the trace's object: how many steps it shows."""
RANKS_KEY = "engram_ranks"
"""Of the trace's object: of how many ranks."""
_OF_STAGE = {
    "exchange": "exchange",
    "reduce": "exchange",
    "forward": "compute",
    "backward": "compute",
    "update": "compute",
}
_BY_NAME = CARRIERS | {"exchange": re.compile("nccl")}  # kernels that do not compute
_FIRST_THREAD = 100

Event = dict[str, Any]


def rank_events(
    trace: dict[str, Any], spans: Iterable[Span], *, rank: int, host: str, since_us: float
) -> Iterator[Event]:
    """A rank's events as they stand in the trace of all.

    Args:
        trace: what its profiler wrote.
        spans: what its loop and other threads did meanwhile.
        rank, host: who it is.
        since_us: subtracted from its times, which count from 1970.
    """
    yield from _names(rank, host)
    shift_us = trace.get("baseTimeNanoseconds", 0) / 1000 - since_us
    events = [event for event in trace["traceEvents"] if not str(event.get("name")).startswith("process_")]
    threads: dict[tuple[str, str], int] = {}
    for event in events:
        place = str(event.get("pid")), str(event.get("tid"))
        moved = event | {"pid": rank, "tid": threads.setdefault(place, _FIRST_THREAD + len(threads))}
        if "ts" in event:
            moved["ts"] = event["ts"] + shift_us
        yield moved
    kernels = [event for event in events if event.get("cat") == "kernel"]
    for lane, name, start_us, duration_us in _of_kernels(kernels):
        yield _lane_event(rank, lane, name, start_us + shift_us, duration_us)
    for each in spans:
        times = each.started_ns / 1000 - since_us, (each.ended_ns - each.started_ns) / 1000
        yield _lane_event(rank, each.lane, each.name, *times)
        if each.lane == "loop" and each.name in _OF_STAGE and not kernels:
            yield _lane_event(rank, _OF_STAGE[each.name], each.name, *times)


def _names(rank: int, host: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}, {host}"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for tid, lane in enumerate(LANES):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": lane}}
        yield {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": rank,
            "tid": tid,
            "args": {"sort_index": tid - len(LANES)},
        }


def _of_kernels(kernels: list[Event]) -> Iterator[tuple[str, str, float, float]]:
    """Lane, name, start and duration of what a GPU did; computation that follows without a gap in one piece."""
    computing = []
    for event in kernels:
        name, start_us, duration_us = event["name"], event["ts"], event["dur"]
        lane = next((lane for lane, pattern in _BY_NAME.items() if pattern.match(name)), None)
        if lane:
            yield lane, name, start_us, duration_us
        else:
            computing.append((start_us, start_us + duration_us))
    for start_us, end_us in union(computing):
        yield "compute", "compute", start_us, end_us - start_us


def _lane_event(rank: int, lane: str, name: str, start_us: float, duration_us: float) -> Event:
    tid = LANES.index(lane)
    return {"ph": "X", "cat": LANE, "name": name, "pid": rank, "tid": tid, "ts": start_us, "dur": duration_us}


def as_text(events: Iterable[Event]) -> str:
    """The events as they stand in a list of JSON, one a line."""
    return ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)


def joined(parts: Iterable[str], *, steps: int, ranks: int) -> Iterator[str]:
    """The text of a trace's object, from that of each rank's events."""
    yield f'{{"{STEPS_KEY}":{steps},"{RANKS_KEY}":{ranks},"displayTimeUnit":"ms","traceEvents":[\n'
    for number, part in enumerate(parts):
        yield f"{',' if number else ''}{part}\n"
    yield "]}\n"
