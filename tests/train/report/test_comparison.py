"""Finished runs side by side, read from folders as `engram train` leaves them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from launch.cli import main
from tests.command_line import JOB
from train.config.file import dump, load
from train.config.job import JobConfig
from train.report.summary import Summary

WITH, WITHOUT = JOB["model"], JOB["model"] | {"engram": None}


def finish(folder: Path, name: str, loss: float, *, seed: int = 0, model: Any = WITH, entropy: float = 6.5) -> Path:
    """Leaves what a run leaves that ended with this validation loss."""
    job = JobConfig(**JOB | {"model": model, "run": {"name": name}, "train": JOB["train"] | {"seed": seed}})
    run = folder / name
    run.mkdir()
    dump(job, run / "config.yaml")
    tables = 64 if job.model.engram else 0
    figures = Summary(str(run), 5, 1280, loss, loss / 2, entropy, 1000, 500, tables, 256, None, 0, 10.0, [])
    (run / "summary.json").write_text(json.dumps(asdict(figures)))
    return run


def compare(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)], prog_name="engram")


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two jobs of two seeds that differ by 0.5 and 0.3, and a third job with the second seed alone."""
    return [
        finish(tmp_path, "plain-0", 4.0, model=WITHOUT),
        finish(tmp_path, "memory-0", 3.5),
        finish(tmp_path, "plain-1", 4.2, model=WITHOUT, seed=1),
        finish(tmp_path, "memory-1", 3.9, seed=1),
        finish(tmp_path, "dense", 5.0, model=WITHOUT | {"moe": None}, seed=1),
    ]


def test_seeds_are_taken_together_and_gaps_seed_by_seed(runs: list[Path]) -> None:
    found = json.loads(compare(*runs, "--json").stdout)["runs"]
    assert [each["name"] for each in found] == ["plain", "memory", "dense"]
    plain, memory, dense = found
    assert plain["val_loss"] == pytest.approx({"mean": 4.1, "least": 4.0, "most": 4.2})
    assert plain["val_loss_to_first"] is None
    assert memory["val_loss_to_first"] == pytest.approx({"mean": -0.4, "least": -0.5, "most": -0.3})
    assert memory["val_loss_by_seed"] == {"0": 3.5, "1": 3.9}
    assert dense["val_loss_to_first"] == pytest.approx({"mean": 0.8, "least": 0.8, "most": 0.8})
    assert (plain["table_parameters"], memory["table_parameters"]) == (0, 64)


def test_a_line_each_for_people(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    lines = compare(*runs).stdout.splitlines()
    (memory,) = (line for line in lines if line.startswith("memory"))
    assert "3.7000 (3.5000 to 3.9000)" in memory
    assert "-0.4000 (-0.5000 to -0.3000)" in memory


def test_nothing_is_left_out_at_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    named = "a-study-with-a-rather-long-name"
    pair = [finish(tmp_path, f"{named}-{seed}", 4.0 + seed, seed=seed, model=WITHOUT) for seed in range(2)]
    for run, count in zip(pair, (12_699_904, 2_286_000), strict=True):
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"parameters": 12_699_904, "table_parameters": count}))
    other = finish(tmp_path, "other", 3.5)
    told = compare(*pair, other).stdout
    assert "…" not in told
    assert max(map(len, told.splitlines())) <= 80
    for shown in ("12.7M", "4.5000", "(4.0000", "5.0000)", "-0.5000", "1,000"):
        assert shown in told


def test_runs_without_a_common_seed_have_no_gap(tmp_path: Path) -> None:
    pair = finish(tmp_path, "a", 4.0), finish(tmp_path, "b", 3.0, seed=1, model=WITHOUT)
    found = json.loads(compare(*pair, "--json").stdout)["runs"]
    assert [each["val_loss_to_first"] for each in found] == [None, None]
    assert compare(*pair).exit_code == 0


def evaluate(run: Path, *losses: tuple[int, float]) -> Path:
    lines = [{"step": 1, "loss": 9.0}, *({"step": s, "tokens": 256 * s, "val_loss": loss} for s, loss in losses)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_unfinished_runs_are_compared_at_the_last_step_that_all_were_evaluated_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = evaluate(finish(tmp_path, "done", 3.5), (2, 5.0), (4, 4.0), (5, 3.5))
    under_way = evaluate(finish(tmp_path, "under-way", 0.0, model=WITHOUT), (2, 5.5), (4, 4.25))
    (under_way / "summary.json").unlink()
    found = json.loads(compare(done, under_way, "--json").stdout)
    assert found["step"] == 4
    assert [run["val_loss"]["mean"] for run in found["runs"]] == [4.0, 4.25]
    assert found["runs"][1]["val_loss_to_first"]["mean"] == 0.25
    assert [run["parameters"] for run in found["runs"]] == [1000, None]
    assert json.loads(compare(done, "--json").stdout)["step"] is None
    monkeypatch.setenv("COLUMNS", "160")
    assert "after step 4, which all have reached" in compare(done, under_way).stdout
    early = evaluate(finish(tmp_path, "early", 0.0, seed=1), (3, 5.0))
    (early / "summary.json").unlink()
    assert "no step after which all runs were evaluated (their last: done 5, early 3)" in compare(done, early).stderr
    elsewhere = evaluate(finish(tmp_path, "elsewhere", 0.0), (4, 1.0))
    (elsewhere / "summary.json").unlink()
    phase = "data.phases=[{after_steps: 3, mix: 1 web 1 code}]"
    for mine, others in (
        ([], ["eval.sequences=4"]),
        (["data.path=web"], ["data.path=web", phase]),
        (["data.mix=1 web 1 code"], ["data.mix=1 web 2 code"]),
    ):
        for run, change in ((done, mine), (elsewhere, others)):
            dump(load(under_way / "config.yaml", change, JobConfig), run / "config.yaml")
        assert "validated on different tokens" in compare(done, elsewhere).stderr, others


def test_what_cannot_be_compared_is_told_in_a_line(runs: list[Path], tmp_path: Path) -> None:
    other_text = finish(tmp_path, "elsewhere", 2.0, entropy=6.0)
    again = finish(tmp_path, "again", 3.0)
    unfinished = finish(tmp_path, "unfinished", 3.0)
    (unfinished / "summary.json").unlink()
    damaged = finish(tmp_path, "damaged", 3.0)
    (damaged / "summary.json").write_text("{")
    going_on = finish(tmp_path, "going-on", 3.0)
    dump(load(going_on / "config.yaml", ["train.steps=9"], JobConfig), going_on / "config.yaml")
    older = finish(tmp_path, "older", 3.0)
    (older / "summary.json").write_text('{"steps": 5}')
    mistyped, none = finish(tmp_path, "mistyped", 3.0), finish(tmp_path, "none", 3.0)
    for run, value in ((mistyped, '"many"'), (none, "null")):
        summary = run / "summary.json"
        summary.write_text(summary.read_text().replace('"val_loss": 3.0', f'"val_loss": {value}'))
    for added, message in (
        (mistyped, "summary.json: damaged (val_loss: input should be a valid number)"),
        (none, "no loss to compare, as it has no validation text"),
        (tmp_path / "nowhere", "not a run"),
        (unfinished, "not finished, and not evaluated yet; wait for step 2"),
        (damaged, "summary.json: damaged"),
        (going_on, "not finished, and not evaluated yet"),
        (older, "summary.json: damaged (run: field required; "),
        (again, "again and memory-0: the same job with the same seed"),
    ):
        result = compare(*runs, added)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    result = compare(runs[0], other_text)
    assert "plain-0 and elsewhere: validated on different tokens" in result.stderr
