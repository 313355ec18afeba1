"""What a trace says: a synthetic one, with events as PyTorch's profiler writes them for a GPU, and a CPU's real one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from launch.bench.trace.trace import summarise
from tests.command_line import invoke
from train.errors import UserError
from train.report.intervals import gaps, length, overlap, union
from train.report.trace import RANKS_KEY, STEPS_KEY

MAIN, INWARDS, OUTWARDS, PLANS = 7, 20, 24, 28


def event(name: str, cat: str, start: float, duration: float, stream: int | None = None) -> dict[str, Any]:
    args = {} if stream is None else {"stream": stream}
    return {"ph": "X", "name": name, "cat": cat, "ts": 1e6 + start, "dur": duration, "tid": stream or 1, "args": args}


def two_steps(carrier: str) -> dict[str, Any]:
    """Two steps of 1 ms each: 0.9 ms of computation, of which 0.1 ms is a kernel that runs beside another."""
    fetch, write = ("_fetch", "_write") if carrier == "kernel" else ("Memcpy HtoD (Pinned -> Device)",
                                                                     "Memcpy DtoH (Device -> Pinned)")  # fmt: skip
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {"name": "python"}}]
    for step in (0.0, 1000.0):
        events += [
            event("gemm", "kernel", step, 600, MAIN),
            event("norm", "kernel", step + 600, 200, MAIN),
            # No computation from 800 to 900.
            event("Memcpy DtoH (Device -> Pageable)", "gpu_memcpy", step + 900, 10, MAIN),
            event("adam", "kernel", step + 910, 90, MAIN),
            # 300 of its 400 microseconds lie under computation.
            event(fetch, carrier, step + 500, 400 if step else 300, INWARDS),
            event(write, carrier, step + 100, 200, OUTWARDS),
            event("Memset (Device)", "gpu_memset", step + 700, 50, INWARDS),
            event("cudaLaunchKernel", "cuda_runtime", step + 10, 5),
            event("cuLaunchKernelEx", "cuda_driver", step + 20, 5),
            event("cudaStreamSynchronize", "cuda_runtime", step + 30, 100),
            event("cudaEventQuery", "cuda_runtime", step + 40, 5),
            event("aten::mm", "cpu_op", step + 40, 5),
        ]
    return {STEPS_KEY: 2, "traceEvents": events}


@pytest.mark.parametrize("carrier", ["kernel", "gpu_memcpy"])
def test_what_is_hidden_idle_and_waited_for(carrier: str) -> None:
    trace = two_steps(carrier)
    if carrier == "kernel":
        # Numbers for the kernels, on a stream of their own, are no rows.
        trace["traceEvents"].append(event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 820, 60, PLANS))
        # All ranks do the same, so one is enough.
        trace["traceEvents"] = [each | {"pid": rank} for rank in (0, 1) for each in trace["traceEvents"]]
        trace[RANKS_KEY] = 2
    found = summarise(trace)
    assert found.steps == 2
    assert found.step_ms == pytest.approx(1.0)
    assert found.computing_ms == pytest.approx(0.9)
    assert found.idle_ms == pytest.approx(0.1)
    assert found.longest_gap_ms == pytest.approx(0.1)
    assert found.fetch_ms == pytest.approx((0.3 + 0.4) / 2)
    assert found.write_back_ms == pytest.approx(0.2)
    assert found.fetch_hidden == pytest.approx((300 + 300) / 700)
    assert found.write_back_hidden == 1.0
    assert (found.launches, found.waits, found.copies_to_host) == (2, 1, 1)
    assert found.waiting_ms == pytest.approx(0.1)
    assert (found.kernels[0].name, found.kernels[0].launches) == ("gemm", 1)
    assert found.kernels[0].ms == pytest.approx(0.6)


def test_each_direction_is_told_by_its_own_carriers() -> None:
    """With engine `mixed` kernels fetch, and copies take back."""
    trace, copies = two_steps("kernel"), two_steps("gpu_memcpy")
    trace["traceEvents"] = [each for each in trace["traceEvents"] if each["name"] != "_write"]
    back = [each for each in copies["traceEvents"] if each.get("args", {}).get("stream") == OUTWARDS]
    trace["traceEvents"] += [*back, event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 820, 60, PLANS)]
    found = summarise(trace)
    assert found.fetch_ms == pytest.approx((0.3 + 0.4) / 2)
    assert (found.write_back_ms, found.write_back_hidden) == (pytest.approx(0.2), 1.0)


def test_without_transfers_nothing_is_said_about_them() -> None:
    trace = {"traceEvents": [event("gemm", "kernel", 0, 500, MAIN)]}
    found = summarise(trace, steps=1)
    assert (found.fetch_hidden, found.write_back_hidden, found.fetch_ms, found.idle_ms) == (None, None, 0, 0)
    with pytest.raises(UserError, match="give --steps"):
        summarise(trace)
    with pytest.raises(UserError, match="has no GPU work"):
        summarise({"traceEvents": [event("aten::mm", "cpu_op", 0, 5)]}, steps=1)


def test_intervals() -> None:
    some = union([(5, 6), (0, 2), (1, 3), (3, 4), (9, 9)])
    assert some == [(0, 4), (5, 6)]
    assert (length(some), gaps(some)) == (5, [(4, 5)])
    assert overlap(some, [(1, 2), (3, 5.5), (7, 8)]) == [(1, 2), (3, 4), (5, 5.5)]


def test_a_table_of_files_names_those_that_are_no_traces(tmp_path: Path) -> None:
    (tmp_path / "window-depth-2.json.gz").write_bytes(gzip.compress(json.dumps(two_steps("kernel")).encode()))
    (tmp_path / "broken.json").write_text("{")
    written = bytearray((tmp_path / "window-depth-2.json.gz").read_bytes())
    written[20] ^= 0xFF  # within the compressed data
    (tmp_path / "flipped.json.gz").write_bytes(written)
    names = ("window-depth-2.json.gz", "broken.json", "flipped.json.gz", "missing.json")
    files = [tmp_path / name for name in names]
    result = invoke("bench", "trace", *map(str, files), "--json")
    assert result.exit_code == 0, result.output
    parts = json.loads(result.stdout)["parts"]
    values = {row["of_a_step"]: row["window-depth-2"] for row in parts["traces"]["rows"]}
    assert values["of the way out, under computation"] == 1.0
    broken, flipped, missing, *_ = parts["traces"]["notes"]
    for name, told in (("broken", broken), ("flipped", flipped)):
        assert told.startswith(f"{name}: ")
        assert "not a trace" in told
    assert "No such file" in missing
    assert {row["trace"] for row in parts["longest"]["rows"]} == {"window-depth-2"}
