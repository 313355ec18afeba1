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
import json, os, sys
from pathlib import Path
import train.config.job  # most commands import it; were it heavy, all would be told so
from launch.cli import main

for number, arguments in enumerate(json.loads(sys.argv[1])):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        folder = Path.cwd() / str(number)
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        for descriptor in (1, 2):
            os.dup2(os.open(folder.with_suffix(f".{{descriptor}}"), os.O_WRONLY | os.O_CREAT), descriptor)
        main(arguments)
    except SystemExit as end:
        heavy = sorted(set({HEAVY!r}) & set(sys.modules))
        folder.with_suffix(".json").write_text(json.dumps([end.code, heavy]))
    finally:
        sys.stdout.flush()
        os._exit(0)
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


HELP = {"engram": ["--help"]} | {command: [command, "--help"] for command in COMMANDS}


def loaded_by(every: list[list[str]], folder: Path) -> list[tuple[int, list[str]]]:
    """Exit codes of commands, and what each imported of what is heavy; forked from one process.

    Each has a folder of its own to stand in, named by its number from 0.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(every)], cwd=folder, env=environment, check=True)
    for number, arguments in enumerate(every):
        assert "Traceback" not in (folder / f"{number}.2").read_text(), arguments
        assert "importing" not in (folder / f"{number}.1").read_text(), f"ranks were started: {arguments}"
    return [tuple(json.loads((folder / f"{number}.json").read_text())) for number in range(len(every))]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, list[str]]]:
    """What all mistakes and then all helps loaded."""
    return loaded_by([*MISTAKES.values(), *HELP.values()], tmp_path_factory.mktemp("starts"))


def test_every_command_is_looked_at() -> None:
    assert {mistake[0] for mistake in MISTAKES.values()} == set(COMMANDS)


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(loaded: list[tuple[int, list[str]]], number: int) -> None:
    assert loaded[number] == (2, [])


@pytest.mark.parametrize("number", range(len(HELP)), ids=HELP)
def test_help_imports_nothing_heavy(loaded: list[tuple[int, list[str]]], number: int) -> None:
    assert loaded[len(MISTAKES) + number] == (0, [])
