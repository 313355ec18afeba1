"""Runs in turns: what is compared is the same steps, and one different bit is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch.bench.report import Section
from launch.bench.side_by_side import Turn, summary
from tests.command_line import write_job


def turn(lane: str, depth: int | None, step_ms: float) -> Turn:
    return Turn(lane, depth, step_ms, 0.0, 10.0, 5.0, {})


def test_ratios_are_taken_turn_by_turn_and_the_first_difference_is_named() -> None:
    turns = [
        [turn("resident", None, 100.0), turn("zero_copy", 2, 101.0)],
        [turn("resident", None, 200.0), turn("zero_copy", 0, 300.0)],
        [turn("resident", None, 400.0), turn("zero_copy", 2, 404.0)],
    ]
    same = [(1.0, 2.0), (1.5, 2.5), (1.25, 2.25)]
    found = summary(turns, {"resident": same, "zero_copy": [*same[:1], (1.5, 2.75), same[2]]})
    assert found["different"] == {"zero_copy": 1}
    section = Section.from_json(found["section"])
    assert [(row["rows"], row["depth"]) for row in section.rows] == [
        ("resident", None),
        ("zero_copy", 0),
        ("zero_copy", 2),
    ]
    ratios = [row["times_resident"].median for row in section.rows]  # type: ignore[union-attr]
    assert ratios == [1.0, 1.5, 1.01]
    assert [(measure.value, measure.met) for measure in section.measures] == [(1, False), (1.01, False)]
    assert summary(turns, {"resident": same, "zero_copy": same})["different"] == {}


def test_a_real_job_has_the_same_bits_while_the_look_ahead_changes(corpus: Path, tmp_path: Path) -> None:
    job, answer = write_job(tmp_path, corpus), tmp_path / "turns.json"
    command = [sys.executable, "-m", "launch.bench.side_by_side", str(job), "--json", str(answer)]
    command += ["--engines", "cpu,staged", "--depths", "2,0", "--steps", "3", "--untimed", "1", "--rounds", "1"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(answer.read_text())
    assert (found["steps"], found["different"]) == (9, {})
    assert [[turn["depth"] for turn in turns] for turns in found["turns"]] == [[None, 2, 2], [None, 0, 0]]
    assert all(turn["fetched"] > 0 for turns in found["turns"] for turn in turns[1:]), "no row travelled"
