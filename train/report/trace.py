"""Traces of several ranks in one: ranks are processes, and what a step consists of has lanes with names.

The form is Chrome's trace event format, as PyTorch's profiler writes it, microseconds.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from offload.spans import Span

TRACE_FILE = "trace.json.gz"
"""Name of the file in a run's folder."""
LANE = "engram"
"""Category of the events in lanes of our own."""
LANES = ("loop", "plan", "fetch", "exchange", "compute", "write back")
"""In the order in which they are shown. `loop` has what the training loop is in, so that its `plan` and `fetch` are
waiting; the others have the work itself, wherever it is done. On a GPU, `exchange` and `compute` are its own times."""
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
_KERNELS = {"fetch": re.compile(r"_fetch(_lines)?\b"), "write back": re.compile(r"_write(_lines)?\b")}
_STAGE = "engram "
_DEVICE = "gpu_user_annotation"
_FIRST_THREAD = 100

Event = dict[str, Any]


def rank_events(
    trace: dict[str, Any], spans: Iterable[Span], *, rank: int, host: str, since_us: float
) -> Iterator[Event]:
    """A rank's events as they stand in the trace of all.

    Args:
        trace: what its profiler wrote.
        spans: what its threads did meanwhile.
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
    for lane, name, start_us, duration_us in _lanes(events):
        yield _lane_event(rank, lane, name, start_us + shift_us, duration_us)
    for each in spans:
        start_us = each.started_ns / 1000 - since_us
        yield _lane_event(rank, each.lane, each.lane, start_us, (each.ended_ns - each.started_ns) / 1000)


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


def _lanes(events: list[Event]) -> Iterator[tuple[str, str, float, float]]:
    """Lane, name, start and duration of what the profiler itself saw."""
    whole = [event for event in events if event.get("ph") == "X"]
    stages = [event for event in whole if str(event["name"]).startswith(_STAGE)]
    has_device = any(event.get("cat") == _DEVICE for event in stages)
    for event in stages:
        name, times = str(event["name"]).removeprefix(_STAGE), (event["ts"], event["dur"])
        of_device = event.get("cat") == _DEVICE
        if not of_device:
            yield "loop", name, *times
        if name in _OF_STAGE and of_device == has_device:
            yield _OF_STAGE[name], name, *times
    for event in whole:
        if event.get("cat") == "kernel":
            for lane, pattern in _KERNELS.items():
                if pattern.match(event["name"]):
                    yield lane, event["name"], event["ts"], event["dur"]


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
