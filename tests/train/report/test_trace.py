"""Lanes of a rank in a trace: what its threads tell, and what the profiler saw of a GPU."""

from typing import Any

from offload.spans import Span
from train.report.trace import LANE, LANES, rank_events

SPANS = [
    Span("loop", "plan", 1_000, 2_000),
    Span("loop", "forward", 2_000, 5_000),
    Span("loop", "reduce", 5_000, 9_000),
    Span("plan", "plan", 3_000, 4_000),
    Span("write back", "write back", 6_000, 8_000),
]


def kernel(name: str, start_us: float, duration_us: float) -> dict[str, Any]:
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": start_us, "dur": duration_us}


def lanes(*kernels: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    trace = {"baseTimeNanoseconds": 3_000, "traceEvents": [*kernels, kernel("aten::mm", 1, 1) | {"cat": "cpu_op"}]}
    events = rank_events(trace, SPANS, rank=0, host="here", since_us=1.0)
    return [(LANES[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e.get("cat") == LANE]


TOLD = {
    ("loop", "plan", 0.0, 1.0),
    ("loop", "forward", 1.0, 3.0),
    ("loop", "reduce", 4.0, 4.0),
    ("plan", "plan", 2.0, 1.0),
    ("write back", "write back", 5.0, 2.0),
}


def test_on_a_cpu_the_stages_of_the_loop_are_the_work() -> None:
    found = lanes()
    assert set(found) == TOLD | {("compute", "forward", 1.0, 3.0), ("exchange", "reduce", 4.0, 4.0)}
    assert len(found) == len(set(found))


def test_on_a_gpu_its_kernels_are_the_work() -> None:
    """As with engine `mixed`: a kernel fetches, a thread writes back."""
    gemm, norm = kernel("gemm", 10, 5), kernel("_read_kernel", 14, 4)
    found = lanes(
        norm, gemm, kernel("adam", 20, 1), kernel("_fetch_lines", 12, 9), kernel("ncclDevKernel_SendRecv()", 16, 2)
    )
    assert set(found) == TOLD | {
        ("compute", "compute", 12.0, 8.0),
        ("compute", "compute", 22.0, 1.0),
        ("fetch", "_fetch_lines", 14.0, 9.0),
        ("exchange", "ncclDevKernel_SendRecv()", 18.0, 2.0),
    }
    assert len(found) == len(set(found))
