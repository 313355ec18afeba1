"""Steps that are not applied: on all ranks, counted, with what their batches were; and batches that are passed over."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import JOB, backbone, engram, losses, table_rows, train, write_job
from train.report.metrics import read_metrics

DIVERGING = ["train.gradient_clipping=null", "optimizer.learning_rate=1e30", "schedule.warmup_steps=0"]
WINDOW = 14
# At so low a rate losses go up and down: some are spikes, too.
STEADY = ["optimizer.learning_rate=1e-5", "schedule.shape=constant"]
NERVOUS = [
    *("train.on_spike=skip", f"train.spike_window={WINDOW}", "train.spike_sigma=0.5", "train.max_skipped_steps=30"),
    *STEADY,
]


def skipped(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def job(corpus: Path, tmp_path: Path) -> Path:
    return write_job(tmp_path, corpus, train={"steps": 16}, checkpoint={"every": 8}, eval={"every": 16})


def test_a_run_stops_at_a_bad_step_with_what_was_before_it_saved(job: Path, tmp_path: Path) -> None:
    result = engram("train", job, *DIVERGING, "train.on_non_finite=stop", "--nproc", "2")
    run = tmp_path / "runs" / "small"
    assert result.returncode == 2
    (step,) = skipped(run)
    done = step["step"] - 1
    assert result.stderr == (
        f"Error: train.on_non_finite is stop, and step {done + 1} was not applied: its gradient is not finite; {done} "
        f"steps are saved in {run}/checkpoints/step-{done:08d}, the same command goes on from there; "
        f"data.skip_steps=[[{done + 1},{done + 1}]] data.allow_change=true passes over its batch\n"
    )
    assert (step["batch"], step["epoch"], len(set(step["sequences"]))) == (done + 1, 0, 8)
    state = json.loads((run / "run.json").read_text())
    assert (state["state"], state["step"]) == ("failed", done)
    assert state["why"] in result.stderr


def test_spikes_are_skipped_counted_and_the_same_after_a_resume(job: Path, tmp_path: Path) -> None:
    train(job, *NERVOUS, "--nproc", "2")
    run = tmp_path / "runs" / "small"
    found, straight, weights, rows = skipped(run), losses(run), backbone(run), table_rows(run)
    for before, step in enumerate(found):
        told = re.fullmatch(r"its (loss|gradient norm) (\S+) is a spike: the (\d+) updates before had .*", step["why"])
        assert told
        number = step["loss"] if told[1] == "loss" else step["grad_norm"]
        assert told[2] == f"{number:.4g}", "ranks would judge by numbers of their own"
        assert int(told[3]) == min(WINDOW, step["step"] - 1 - before)
    assert any("its loss" in step["why"] for step in found), "nothing of what ranks have of their own would be tested"
    assert any(step["step"] > 8 for step in found), "nothing of what follows would be tested"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_steps"] == len(found)
    shutil.rmtree(run / "checkpoints" / "step-00000016")
    train(job, *NERVOUS, "--nproc", "2")
    assert skipped(run) == found
    assert (losses(run), backbone(run), table_rows(run)) == (straight, weights, rows)
    # What is left is a run that never saw these batches.
    bad = [step["step"] for step in found]
    passed = [f"data.skip_steps={[[step, step] for step in bad]}", f"train.steps={16 - len(bad)}", "run.name=past"]
    train(job, *STEADY, *passed, "--nproc", "2")
    past = run.with_name("past")
    applied = [loss for step, (loss, _) in enumerate(straight, 1) if step not in bad]
    assert [loss for loss, _ in losses(past)] == applied
    assert (backbone(past), table_rows(past)) == (weights, rows), "a step that was skipped left a trace"


def test_a_run_goes_on_past_bad_batches_if_that_is_wanted(job: Path, tmp_path: Path) -> None:
    train(job, "train.steps=8", "--nproc", "1")
    run = tmp_path / "runs" / "small"
    plain = shutil.copytree(run, run.with_name("plain"))
    past = ["data.skip_steps=[[9, 10]]", "train.steps=10"]
    refused = engram("train", job, *past, "--nproc", "1")
    assert refused.returncode == 2
    assert "data.skip_steps (null, now [[9, 10]])" in refused.stderr
    assert "data.allow_change=true" in refused.stderr
    train(job, *past, "data.allow_change=true", "--nproc", "1")
    manifest = json.loads((run / "checkpoints/step-00000010/manifest.json").read_text())
    assert manifest["data_changes"] == [{"step": 8, "change": "data.skip_steps (null, now [[9, 10]])"}]
    train(job, "train.steps=10", "run.name=plain", "--nproc", "1")
    assert losses(run)[:8] == losses(plain)[:8]
    assert losses(run)[8][0] != losses(plain)[8][0]


def test_tokens_count_on_when_the_batch_becomes_another(job: Path, tmp_path: Path) -> None:
    train(job, "train.steps=2", "train.global_batch_size=8", "--nproc", "1")
    train(job, "train.steps=3", "train.global_batch_size=4", "data.allow_change=true", "--nproc", "1")
    run = tmp_path / "runs" / "small"
    length = JOB["data"]["sequence_length"]
    assert [record["tokens"] for record in read_metrics(run / "metrics.jsonl")] == [
        8 * length,
        16 * length,
        20 * length,
    ]
    assert json.loads((run / "summary.json").read_text())["tokens"] == 20 * length
