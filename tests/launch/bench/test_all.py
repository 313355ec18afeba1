"""`engram bench all`: parts within their time, and figures of the others where one fails."""

import json
import sys
from pathlib import Path

import pytest

from launch.bench import everything
from launch.bench.everything import Outcome, run_command, run_everything
from launch.bench.report import Section
from tests.command_line import invoke


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

    def run(command: list[str], seconds: float, partial: Path | None) -> Outcome:
        asked[command[5]] = command, seconds
        return Outcome(0.0, None, "failed: on purpose")

    monkeypatch.setattr(everything, "run_command", run)
    outcomes = run_everything(10, "cpu", {"train": ("--job", "x.yaml")})
    assert list(outcomes) == ["links", "kernels", "offload", "train"]
    assert asked["links"][1] == pytest.approx(87, abs=2)  # a tenth, and a twentieth of all others' shares
    assert asked["train"][1] == pytest.approx(600, abs=2)  # all that nobody used
    assert asked["train"][0][-2:] == ["--job", "x.yaml"]
    assert "--seconds" not in asked["offload"][0]
    assert all("left out" in str(outcome.reason) for outcome in run_everything(0.01, "cpu").values())


def test_no_part_takes_the_time_of_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part works for as long as it may."""
    now, taken = [0.0], {}

    def run(command: list[str], seconds: float, partial: Path | None) -> Outcome:
        now[0] += seconds
        taken[command[5]] = seconds
        return Outcome(seconds, None, "ended")

    monkeypatch.setattr(everything, "run_command", run)
    monkeypatch.setattr(everything.time, "monotonic", lambda: now[0])
    run_everything(10, "cpu")
    assert sum(taken.values()) <= 600
    assert all(taken[share.name] >= 0.8 * 600 * share.weight for share in everything.SHARES)


def test_all_tells_what_failed_and_writes_what_did_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = Section("Links of something", [{"what": "kernel", "GB_per_s": 1.5}])
    answer = {"options": {}, "parts": {"links": section.to_json()}}
    outcomes = {"kernels": Outcome(1.0, None, "failed: no GPU"), "links": Outcome(2.0, answer)}
    monkeypatch.setattr(
        everything, "run_everything", lambda minutes, device, more, parts, so_far: (so_far(outcomes), outcomes)[1]
    )
    file = tmp_path / "figures.json"
    result = invoke("bench", "all", "--device", "cpu", "--json", str(file))
    assert result.exit_code == 0, result.output
    assert "Links of something" in result.stdout
    assert "failed: no GPU" in result.stdout
    parts = json.loads(file.read_text())["parts"]
    assert parts["kernels"]["status"] == "failed: no GPU"
    assert parts["links"]["sections"]["links"]["rows"][0]["GB_per_s"] == 1.5


def test_a_part_that_is_ended_leaves_what_it_found_so_far(tmp_path: Path) -> None:
    answer = {"options": {}, "parts": {"links": Section("Links", [{"what": "kernel"}]).to_json()}}
    partial = tmp_path / "partial.json"
    partial.write_text(json.dumps(answer))
    outcome = run_command([sys.executable, "-c", "import sys; sys.exit('Error: too late')"], 60, partial)
    assert (outcome.reason, list(everything.sections_of(outcome))) == ("failed: too late", ["links"])
    partial.write_text(json.dumps(answer)[:-9])
    assert run_command([sys.executable, "-c", "raise SystemExit(1)"], 60, partial).answer is None
