"""Part `train`: what is compared is the same steps, and one different bit is told."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launch.bench.options import BenchOptions
from launch.bench.report import Section
from launch.bench.training import part
from launch.bench.training.lane import RESIDENT, Lane, Turn
from launch.bench.training.part import Scale, summary
from tests.command_line import TIMEOUT_S, engram, write_job
from tests.warm_command import started_warm

SCALE = Scale(tokens=1000, flops=2e9, peak=4e10, dtype="fp32")
SAME = [(1.0, 2.0), (1.5, 2.5), (1.25, 2.25)]


def turn(lane: str, depth: int | None, step_ms: float) -> Turn:
    return Turn(lane, depth, step_ms, 0.0, 10.0, 5.0, {"begin": step_ms / 100})


def summarised(turns: list[list[Turn]], results: list[tuple[float, float]]) -> Section:
    lanes = [Lane(RESIDENT, None, None, SAME), Lane("zero_copy", None, None, results)]
    return summary(turns, lanes, BenchOptions(depths=(2, 0, 1)), SCALE)


def test_ratios_are_taken_turn_by_turn_and_the_first_difference_is_named() -> None:
    turns = [
        [turn(RESIDENT, None, 100.0), turn("zero_copy", 2, 101.0)],
        [turn(RESIDENT, None, 200.0), turn("zero_copy", 0, 300.0)],
        [turn(RESIDENT, None, 400.0), turn("zero_copy", 2, 404.0)],
    ]
    section = summarised(turns, [*SAME[:1], (1.5, 2.75), SAME[2]])
    assert "first different step: {'zero_copy': 2}" in section.notes[0]
    rows = {(row["rows"], row["depth"]): row for row in section.rows}
    assert list(rows) == [(RESIDENT, None), ("zero_copy", 0), ("zero_copy", 1), ("zero_copy", 2)]
    assert (rows["zero_copy", 1]["turns"], rows["zero_copy", 1]["step_ms"]) == (0, None)
    measured = [row["times_resident"].median for row in section.rows if row["turns"]]  # type: ignore[union-attr]
    assert measured == [1.0, 1.5, 1.01]
    assert [(measure.value, measure.met) for measure in section.measures] == [(1, False), (1.01, True)]
    # 1,000 tokens and 2 GFLOP in 0.2 s, where 8 would be possible.
    assert rows[RESIDENT, None]["tokens_per_s"] == 5000
    assert rows[RESIDENT, None]["model_FLOPs_utilisation_percent"] == pytest.approx(25)
    assert any("zero_copy at depth 0: begin 3.0" in note for note in section.notes)


def test_nothing_is_judged_before_a_turn_was_timed() -> None:
    section = summarised([], SAME)
    assert [(measure.value, measure.met) for measure in section.measures] == [(0, True)]
    assert {row["turns"] for row in section.rows} == {0}


def test_a_turn_is_timed_without_its_first_steps_at_the_look_ahead_asked_for() -> None:
    asked: list[int] = []
    traffic = SimpleNamespace(fetched=8, written_back=4, waited_s=0.0)
    tables = SimpleNamespace(look_ahead=asked.append, take_traffic=lambda: traffic)
    run = SimpleNamespace(tables=tables, engine=SimpleNamespace(device=torch.device("cpu")))

    def train_step(step: int) -> Any:
        time.sleep(0.2 if step < 12 else 0)
        return SimpleNamespace(loss=torch.tensor(float(step)), grad_norm=1.0)

    lane = Lane("cpu", run, SimpleNamespace(train_step=train_step))
    turn = lane.train(range(10, 16), 2, depth=3)
    assert turn.step_ms < 50
    assert (turn.depth, asked, turn.fetched, turn.written_back) == (3, [3], 2, 1)
    assert lane.results == [(float(step), 1.0) for step in range(10, 16)]


def measure_no_peak() -> None:
    """Large matrix products, which the steps are compared with, run a few times and not for a second."""
    part._PEAK_SECONDS["cpu"] = 0.0


@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_real_job_has_the_same_bits_while_the_look_ahead_changes(nproc: int, corpus: Path, tmp_path: Path) -> None:
    job, partial = write_job(tmp_path, corpus, run={"nproc": nproc}), tmp_path / "partial.json"
    engines = ["--engine", "cpu", "--engine", "staged"] if nproc == 1 else ["--engine", "cpu"]
    short = ["--depths", "2,0", "--steps", "2", "--warmup", "1", "--traces", str(tmp_path / "traces")]
    asked = ["--job", str(job), *engines, *short, "--partial", str(partial), "--device", "cpu", "--json"]
    environment = {"OMP_NUM_THREADS": "1"}
    with started_warm(
        ["bench", "train", *asked], cwd=None, environment=environment, prepare=measure_no_peak
    ) as command:
        done = command.result(TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-2000:]
    section = json.loads(done.stdout)["parts"]["train"]
    assert section == json.loads(partial.read_text())["parts"]["train"]
    assert [(row["depth"], row["turns"]) for row in section["rows"]] == [(None, 2), *[(0, 1), (2, 1)] * (3 - nproc)]
    assert section["notes"][0] == "11 steps of each run; first different step: None"
    assert section["measures"][0]["met"]
    assert all(row["rows_in"] > 0 for row in section["rows"] if row["depth"] is not None), "no row travelled"
    assert {path.name for path in (tmp_path / "traces").iterdir()} >= {"resident.json.gz", "cpu.json.gz"}
    assert not (tmp_path / "runs").exists(), "runs that nobody asked for stay behind"


def test_a_job_that_cannot_be_measured_is_told_in_one_line(corpus: Path, tmp_path: Path) -> None:
    done = engram("bench", "train", "--job", str(write_job(tmp_path, corpus)), "model.engram=null")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("a model without model.engram has no tables to measure")
