"""`engram bench all`: parts within their time, and figures of the others where one fails."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launch.bench import everything, training
from launch.bench.everything import Outcome, run_command, run_everything
from launch.bench.options import BenchOptions
from launch.bench.progress import Progress
from launch.bench.report import Section
from launch.cli import main

PEAK = Section(
    "peak", [{"dtype": "fp32", "size": 8, "TFLOP_per_s": 2.0}, {"dtype": "bf16", "size": 8, "TFLOP_per_s": 4.0}]
)


def test_a_part_answers_fails_or_is_ended() -> None:
    def run(code: str, seconds: float) -> Outcome:
        return run_command([sys.executable, "-c", code], seconds)

    assert run("print('{\"parts\": {}}')", 60).answer == {"parts": {}}
    failed = run("import sys; sys.exit('Error: no such thing')", 60)
    assert (failed.answer, failed.reason) == (None, "failed: no such thing")
    late = run("import time; time.sleep(60)", 0.5)
    assert late.reason == "ended: it took longer than 0 s" or late.reason == "ended: it took longer than 1 s"
    assert late.seconds < 20


def test_shares_follow_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, tuple[list[str], float]] = {}

    def run(command: list[str], seconds: float) -> Outcome:
        asked[command[5]] = command, seconds
        return Outcome(0.0, None, "failed: on purpose")

    monkeypatch.setattr(everything, "run_command", run)
    outcomes = run_everything(10, "cpu", {"train": ("--job", "x.yaml")})
    assert list(outcomes) == ["kernels", "links", "offload", "train"]
    assert asked["kernels"][1] == pytest.approx(180, abs=2)  # 1.5 times a fifth
    assert asked["train"][1] == pytest.approx(600, abs=2)  # all that nobody used
    assert asked["train"][0][-2:] == ["--job", "x.yaml"]
    assert "--seconds" not in asked["offload"][0]
    assert all("left out" in str(outcome.reason) for outcome in run_everything(0.01, "cpu").values())


def test_all_tells_what_failed_and_writes_what_did_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = Section("Links of something", [{"what": "kernel", "GB_per_s": 1.5}])
    answer = {"options": {}, "parts": {"links": section.to_json()}}
    outcomes = {"kernels": Outcome(1.0, None, "failed: no GPU"), "links": Outcome(2.0, answer)}
    monkeypatch.setattr(everything, "run_everything", lambda minutes, device, more: outcomes)
    file = tmp_path / "figures.json"
    result = CliRunner().invoke(main, ["bench", "all", "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "Links of something" in result.stdout
    assert "failed: no GPU" in result.stdout
    parts = json.loads(file.read_text())["parts"]
    assert parts["kernels"]["status"] == "failed: no GPU"
    assert parts["links"]["sections"]["links"]["rows"][0]["GB_per_s"] == 1.5


def test_training_compares_every_depth_with_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(job: str, steps: int, *, device: str, offload__mode: str, offload__depth: int | None = None):  # type: ignore[no-untyped-def]
        ms = {None: 100.0, 0: 150.0, 1: 110.0, 2: 101.0, 4: 104.0}[offload__depth]
        loss = 3.0 if offload__depth != 4 else 3.5
        return [{"step_ms": 1000.0, "loss": 4.0}] + [{"step_ms": ms, "loss": loss}] * (steps - 1)

    monkeypatch.setattr(training, "train_run", trained)
    options = BenchOptions(steps=3, warmup=1, runs=2)
    with Progress("train", active=False) as progress:
        section = training.measure_training(options, PEAK, progress)
    by_depth = {row["depth"]: row for row in section.rows}
    assert list(by_depth) == [None, 2, 1, 4, 0]
    assert by_depth[0]["times_resident"].median == 1.5  # type: ignore[union-attr]
    assert by_depth[2]["losses"] == "the same bits"
    assert by_depth[4]["losses"] == "DIFFERENT"
    # configs/tiny.yaml has 16 sequences of 256 tokens a step.
    assert by_depth[None]["tokens_per_s"] == pytest.approx(16 * 256 / 0.1)
    flops = float(by_depth[None]["TFLOP_per_s"])  # type: ignore[arg-type]
    assert by_depth[None]["model_FLOPs_utilisation_percent"] == pytest.approx(100 * flops / 2.0)
    assert [measure.value for measure in section.measures] == [pytest.approx(1.01), 1]

    with Progress("train", active=False) as progress:
        cut = training.measure_training(BenchOptions(steps=3, warmup=1, seconds=0.0), PEAK, progress)
    assert [row["status"] for row in cut.rows] == ["measured"] + ["left out: no time was left"] * 4
