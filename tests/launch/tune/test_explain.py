"""`engram tune --explain`: the bottleneck by its stages, and what moves it."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.tune.explain import STAGES, Explained, explained
from tests.command_line import invoke, write_job
from train.errors import UserError
from train.report.metrics import METRICS_FILE, read_metrics

USUAL = {"forward": 30.0, "backward": 50.0, "reduce": 5.0, "update": 5.0, "exchange": 5.0, "other": 5.0}


def run_of(folder: Path, stages: dict[str, float], offload: dict[str, float] | None = None, **config: Any) -> Path:
    """A run's folder whose steps had these stages; its first record is of the start."""
    run = folder / "run"
    run.mkdir()
    write_job(folder, folder, train={"micro_batch_size": 2}, offload={"window_rows": 1500, **config}).rename(
        run / "config.yaml"
    )
    of_all = dict.fromkeys(STAGES, 0.0) | USUAL | stages
    tables = {"stall_ms": stages.get("fetch", 0.0), "hit_rate": 0.4, "fetch_rows": 900, "plan_ms": 3.0} | (
        offload or {}
    )
    records = [{"step": 1, "step_ms": 5000.0} | {f"stages.{stage}_ms": 625.0 for stage in STAGES}]
    for step in range(2, 12):
        record = {"step": step, "step_ms": sum(of_all.values())} | {f"offload.{key}": tables[key] for key in tables}
        records.append(record | {f"stages.{stage}_ms": ms for stage, ms in of_all.items()})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.mark.parametrize(
    ("stages", "offload", "config", "stage", "setting", "words"),
    [
        ({"fetch": 40.0}, {}, {"depth": 1}, "fetch", "offload.depth=2", "waits 40.0 ms of 140 for rows"),
        ({"fetch": 40.0}, {}, {"depth": 4}, "fetch", "offload.window_rows=3000", "it is the bus that is slow"),
        ({"plan": 40.0}, {"plan_ms": 139.0}, {}, "plan", "offload.planner_threads=2", "the planner works 139 ms"),
        ({"plan": 40.0}, {"plan_ms": 9.0}, {"depth": 2}, "plan", "offload.depth=4", "works only 9 ms"),
        ({"fetch": 1.0}, {}, {}, "model", "train.micro_batch_size=4", "what a step is for"),
        ({"reduce": 300.0}, {}, {}, "reduce", "deepspeed.communication_data_type=bf16", "summed over ranks"),
        ({"update": 300.0}, {}, {}, "update", "offload.optimizer.untouched_rows=closed", "optimizers"),
        ({"exchange": 300.0}, {}, {}, "exchange", "offload.exchange_dtype=bf16", "network between ranks"),
        ({"other": 300.0}, {}, {}, "other", "train.log_every", "between steps"),
        # Waiting comes before work, however small it is beside it.
        ({"update": 300.0, "fetch": 20.0}, {}, {"depth": 1}, "fetch", "offload.depth=2", "waits"),
    ],
)
def test_the_bottleneck_is_named_with_what_moves_it(
    stages: dict[str, float], offload: dict[str, float], config: dict[str, Any], stage: str, setting: str, words: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    found = explained(run_of(tmp_path, stages, offload, **config))
    first = found.findings[0]
    assert (first.stage, first.settings[0]) == (stage, setting)
    assert words in first.text
    assert found.step_ms == pytest.approx(sum(found.stages_ms.values())), "the start's record counts"
    assert found.steps == (2, 11)


def test_a_look_ahead_that_the_run_chose_itself_is_what_counts(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"fetch": 40.0}, depth="auto")
    assert explained(run).findings[0].settings[0] == "offload.depth=2"
    state = {"state": "running", "step": 3, "steps": 9, "look_ahead": 2, "host": "here", "pid": 1, "parent": 1}
    (run / "run.json").write_text(json.dumps(state | {"started": "", "written": ""}))
    assert explained(run).findings[0].settings[0] == "offload.depth=4"


def test_the_command_tells_all_stages_and_has_json(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"fetch": 40.0}, depth=1)
    shown = invoke("tune", "--explain", str(run))
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "bottleneck: fetch, 29% of the step: the loop waits 40.0 ms of 140 for rows" in text
    assert "to move it: offload.depth=2; offload.window_rows=3000" in text
    assert all(name in text for name in ("waiting for rows", "backward", "between steps", "a step"))
    answer = json.loads(invoke("tune", "--explain", str(run), "--json").output)
    assert answer["findings"][0]["settings"] == ["offload.depth=2", "offload.window_rows=3000"]


def test_a_run_without_records_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path, {})
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl: no record tells the stages"):
        explained(run)


def test_a_real_run_is_explained(trained: Path) -> None:
    found: Explained = explained(trained)
    counted = [record for record in read_metrics(trained / METRICS_FILE) if "step_ms" in record][1:]
    for record in counted:
        assert sum(record[f"stages.{stage}_ms"] for stage in found.stages_ms) == pytest.approx(record["step_ms"])
    steps_ms = [record["step_ms"] for record in counted]
    assert min(steps_ms) <= found.step_ms <= max(steps_ms)
    assert "model" in {finding.stage for finding in found.findings}
