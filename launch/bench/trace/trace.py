"""What a trace of training steps shows: whether rows travel during the computation, and what holds up the GPU.

A trace is that of `train.profile`, as PyTorch's profiler writes it (Chrome's trace event format): one event for each
kernel and copy on the GPU, with its stream, and for each call of CUDA's API, all in microseconds.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.carriers import CARRIERS
from train.errors import UserError
from train.report.intervals import Interval, gaps, length, overlap, union
from train.report.trace import RANKS_KEY, STEPS_KEY

_ON_GPU = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_API = frozenset(("cuda_runtime", "cuda_driver"))
# What carries rows in and out, where no kernels do.
_COPIES = {"fetch": re.compile("Memcpy HtoD"), "write back": re.compile("Memcpy DtoH")}
_WAIT = re.compile(r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cudaMemcpy$")
_LAUNCH = re.compile(r"^cu(da)?Launch")
_TOP = 12
_NAME = 90  # characters; names of templates go on for lines


@dataclass(frozen=True)
class Kernel:
    """A kernel, over all its launches.

    Attributes:
        name: shortened.
        ms: per step.
        launches: per step.
    """

    name: str
    ms: float
    launches: float


@dataclass(frozen=True)
class TraceSummary:
    """Times in milliseconds per step, numbers per step, unless stated otherwise.

    Attributes:
        steps: how many the trace shows.
        step_ms: from the first to the last work of the GPU; a little less than the steps took.
        computing_ms: any kernel or copy ran on a stream that carries no rows.
        idle_ms: none did, but rows may have travelled.
        longest_gap_ms: the longest time without any, not a mean per step.
        fetch_ms, write_back_ms: rows were on their way in, or out.
        fetch_hidden, write_back_hidden: the share of that time during which there was computation; None without any.
        launches: kernels started.
        waits: calls in which the host waits for the GPU.
        waiting_ms: how long they took, all threads together.
        copies_to_host: on the streams of the computation: the host wants to know a result.
        kernels: those that took longest.
    """

    steps: int
    step_ms: float
    computing_ms: float
    idle_ms: float
    longest_gap_ms: float
    fetch_ms: float
    write_back_ms: float
    fetch_hidden: float | None
    write_back_hidden: float | None
    launches: float
    waits: float
    waiting_ms: float
    copies_to_host: float
    kernels: list[Kernel]

    def to_json(self) -> dict[str, Any]:
        """The summary as a JSON object."""
        return asdict(self)


def read_trace(path: str | Path) -> dict[str, Any]:
    """The trace's object.

    Raises:
        UserError: there is no such file, or it is not a trace.
    """
    try:
        written = Path(path).read_bytes()
        trace = json.loads(gzip.decompress(written) if str(path).endswith(".gz") else written)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or "not a trace that PyTorch's profiler wrote"
        raise UserError(f"{path}: {reason}") from None
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise UserError(f"{path}: not a trace of PyTorch's profiler: it has no traceEvents")
    return trace


def summarise(trace: dict[str, Any], steps: int | None = None) -> TraceSummary:
    """Computes the summary.

    Args:
        trace: from `read_trace`.
        steps: how many it shows; None for what it says itself.

    Raises:
        UserError: no GPU worked in it, or it does not say how many steps it shows.
    """
    steps = steps or int(trace.get(STEPS_KEY, 0))
    if steps < 1:
        raise UserError(f"the trace does not say how many steps it covers ({STEPS_KEY}): give --steps")
    # Of several ranks, the first: all of them do the same.
    several = RANKS_KEY in trace
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and not (several and event["pid"])]
    work = [event for event in events if event.get("cat") in _ON_GPU]
    if not work:
        raise UserError("the trace has no GPU work, so it says nothing about transfers and gaps")
    main, others = _streams(work)
    computing = union(map(_interval, main))
    fetches, writes = (_travelling(others, direction) for direction in CARRIERS)
    idle = gaps(computing)
    calls = [event for event in events if event.get("cat") in _API]
    waits = [event for event in calls if _WAIT.match(event["name"])]
    each = 1e-3 / steps
    return TraceSummary(
        steps=steps,
        step_ms=each * (max(_interval(event)[1] for event in work) - min(event["ts"] for event in work)),
        computing_ms=each * length(computing),
        idle_ms=each * length(idle),
        longest_gap_ms=1e-3 * max((end - start for start, end in idle), default=0.0),
        fetch_ms=each * length(fetches),
        write_back_ms=each * length(writes),
        fetch_hidden=_hidden(fetches, computing),
        write_back_hidden=_hidden(writes, computing),
        launches=sum(bool(_LAUNCH.match(event["name"])) for event in calls) / steps,
        waits=len(waits) / steps,
        waiting_ms=each * sum(event["dur"] for event in waits),
        copies_to_host=sum("Memcpy DtoH" in event["name"] for event in main) / steps,
        kernels=_longest(work, steps),
    )


def _streams(work: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The GPU's work on streams of the computation, and on those that carry rows.

    The latter are those with a fetch's or write-back's kernels or copies on them, other than the busiest one: the
    computation makes small copies itself.
    """
    by_stream: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in work:
        by_stream[event.get("args", {}).get("stream", event.get("tid"))].append(event)

    def busy(stream: Any) -> float:
        return sum(event["dur"] for event in by_stream[stream] if event["cat"] == "kernel" and not _travels(event))

    busiest = max(by_stream, key=busy)
    others = [
        stream for stream, events in by_stream.items() if stream != busiest and any(_travels(event) for event in events)
    ]
    main = [event for stream, events in by_stream.items() if stream not in others for event in events]
    return main, [event for stream in others for event in by_stream[stream]]


def _travels(event: dict[str, Any]) -> bool:
    return any(kind.match(event["name"]) for kind in (*CARRIERS.values(), *_COPIES.values()))


def _travelling(others: list[dict[str, Any]], direction: str) -> list[Interval]:
    """When rows travelled: beside kernels that carry them, copies one way are of numbers; `mixed` has both."""
    for carrier in (CARRIERS[direction], _COPIES[direction]):
        if found := union(_interval(event) for event in others if carrier.match(event["name"])):
            return found
    return []


def _interval(event: dict[str, Any]) -> Interval:
    return event["ts"], event["ts"] + event["dur"]


def _hidden(travelling: list[Interval], computing: list[Interval]) -> float | None:
    return length(overlap(travelling, computing)) / length(travelling) if travelling else None


def _longest(work: Iterable[dict[str, Any]], steps: int) -> list[Kernel]:
    times: dict[str, list[float]] = defaultdict(list)
    for event in work:
        times[event["name"]].append(event["dur"])
    first = sorted(times, key=lambda name: -sum(times[name]))[:_TOP]
    return [Kernel(name[:_NAME], 1e-3 * sum(times[name]) / steps, len(times[name]) / steps) for name in first]
