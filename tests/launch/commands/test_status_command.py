"""`engram status`, as one process sees the run of others."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from launch.commands.status_report import shown
from tests.command_line import invoke
from tests.launch.test_starts import loaded_by
from train.run_state import RunState
from train.status.pulse import Life
from train.status.status import RunStatus
from train.watch.heartbeat import Beat

RUNNING = RunStatus(
    run="runs/a",
    state="running",
    step=120,
    steps=210,
    metrics={
        "step": 120,
        "loss": 3.4119,
        "grad_norm": 1.0,
        "step_ms": 702.0,
        "tokens_per_s": 5811.7,
        "tokens": 491_520,
        "epoch": 0.42,
        "mfu": 0.31,
        "offload.stall_ms": 0.44,
        "offload.hit_rate": 0.812,
        "val_loss": 3.5,
        "val_step": 105,
    },
    eta_s=92.0,
    saved_step=105,
    saved_age_s=72.0,
    ranks=4,
    lives=[
        Life(Beat(rank, f"host-{rank // 2}", 1, 121, "compute", 1, 0.0, 0.0, 2**30, 2**20), age, age > 20)
        for rank, age in enumerate((1.0, 2.0, 95.0))
    ],
)


def text(*found: RunStatus) -> str:
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(shown([*found]))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def test_a_page_has_all_that_is_known_in_80_columns() -> None:
    found = text(RUNNING)
    for told in (
        "runs/a  running",
        "120 of 210 (57 %), 1:32 to go",
        "3.4119, validation 3.5000 (step 105), gradient norm 1",
        "5,812 tokens/s, 702 ms a step, 31.0% MFU",
        "epoch 0.420, 491,520 tokens seen",
        "stall 0.4 ms, hit rate 81.2%",
        "step 105, 1:12 ago",
        "host-1: rank 2, step 121 compute, silent 1:35",
        "host-0: ranks 0-1, step 121 compute, heard 0:02 ago, host 2.00 GiB",
        "1 of 4 have no heartbeat that can be seen here",
    ):
        assert told in found, found
    assert max(map(len, found.splitlines())) <= 80
    assert found.index("host-1") < found.index("host-0"), "who is silent comes first"


def test_several_runs_are_lines_and_reasons_follow() -> None:
    why = "Traceback ...\n  File x\nRuntimeError: boom"
    found = text(RUNNING, RunStatus("runs/b", "failed", why, 5, 9), RunStatus("runs/c", "not started"))
    lines = found.splitlines()
    assert re.match(r"runs/a +running +120/210 +3.4119 +3.5000 +5,812 +1:32 +105$", lines[1])
    assert re.match(r"runs/b +failed +5/9$", lines[2])
    assert lines[4:] == ["runs/b: RuntimeError: boom"]


def test_the_command_tells_of_runs_without_torch(tmp_path: Path) -> None:
    for name, state in (("a", RunState("finished", 9, 9)), ("b", RunState("interrupted", 5, 9, why="by SIGTERM"))):
        run = tmp_path / "0" / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").touch()
        state.write(run)
    assert loaded_by([["status", "a", "runs/b", "--json"]], tmp_path) == [(0, [])]


def test_watching_ends_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").touch()
    state = RunState("running", 3, 9)
    state.write(tmp_path)

    def sleep(seconds: float) -> None:
        replace(state, state="failed", why="boom").write(tmp_path)

    monkeypatch.setattr(time, "sleep", sleep)
    result = invoke("status", str(tmp_path), "--watch")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "boom" in result.stdout
    result = invoke("status", str(tmp_path), "--json")
    assert json.loads(result.stdout)["runs"][0]["why"] == "boom"
    assert invoke("status", str(tmp_path), "--json", "--watch").exit_code == 2
