"""A user's mistake is told before anything heavy is imported, by every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import COMMANDS

HEAVY = ("torch", "sympy", "deepspeed", "numba", "transformers")
PROGRAM = f"""
import json, sys
from launch.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(json.dumps([end.code, sorted(set({HEAVY!r}) & set(sys.modules))]))
"""
JOB = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
MISTAKES = {
    "bench train": ["bench", "train", "train.stepz=3"],
    "bench train, a file": ["bench", "train", JOB],
    "bench links": ["bench", "links", "--nothing"],
    "checkpoint ls": ["checkpoint", "ls", "nowhere"],
    "checkpoint verify": ["checkpoint", "verify", "nowhere"],
    "checkpoint diff": ["checkpoint", "diff", "nowhere", "nowhere"],
    "checkpoint prune": ["checkpoint", "prune", "nowhere", "--keep", "1"],
    "compare": ["compare", "nowhere"],
    "data": ["data", "prepare", "nowhere", "--out", "x", "--train-bpe", "300"],
    "doctor": ["doctor", JOB, "train.stepz=3"],
    "eval": ["eval", "nowhere"],
    "export": ["export", "nowhere", "--to", "x"],
    "generate": ["generate", "nowhere", "def"],
    "inspect": ["inspect", "nowhere", "def"],
    "inspect, no text": ["inspect", "nowhere"],
    "launch": ["launch", JOB, "--on", "slurm"],
    "plan": ["plan", JOB, "model.layers=3"],
    "tune": ["tune", JOB, "offload.dept=2"],
    "tune, no tables": ["tune", JOB, "model.engram=null"],
    "tune, a run": ["tune", "--explain", "nowhere"],
    "report": ["report", "nowhere"],
    "status": ["status", "nowhere"],
    "train, a key": ["train", JOB, "train.stepz=3"],
    "train, data": ["train", JOB, "data.path=nowhere"],
    "train, a GPU's planner": ["train", JOB, "offload.planner=device"],
    "train, a file": ["train", "nowhere.yaml"],
}


def loaded(*arguments: str, cwd: Path) -> tuple[int, list[str]]:
    """Exit code of a command, and what it imported of what is heavy."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=True)
    assert "Traceback" not in done.stderr
    assert "importing" not in done.stdout, "ranks were started"
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    return code, heavy


def test_every_command_is_looked_at() -> None:
    assert {mistake[0] for mistake in MISTAKES.values()} == set(COMMANDS)


@pytest.mark.parametrize("arguments", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(arguments: list[str], tmp_path: Path) -> None:
    assert loaded(*arguments, cwd=tmp_path) == (2, [])


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=["engram", *COMMANDS])
def test_help_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    assert loaded(*command, "--help", cwd=tmp_path) == (0, [])
