"""The README's commands, run as they stand there (training is cut to two steps)."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
SHORT = ["train.steps=2", "eval.sequences=4", "eval.sample_tokens=2", f"data.cache={ROOT / 'data'}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to stand in: the repository's configs, and somebody's texts."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "my-texts").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py")):
        (folder / "my-texts" / f"{path.stem}.txt").write_bytes(path.read_bytes())
    return folder


def test_the_readme_shows_what_a_run_ends_with() -> None:
    text = (ROOT / "README.md").read_text()
    assert "<!--" not in text
    assert "validation loss" in text


def test_the_readme_has_the_two_commands_and_they_are_make_targets() -> None:
    assert COMMANDS[:2] == ["make train", "make test"]
    for command, expected in (
        ("make train", "engram train configs/tiny.yaml"),
        ("make test", "pytest"),
        ("make test-long", "pytest"),
    ):
        dry = subprocess.run(
            [*command.split(), "-n", "-o", "venv"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert expected in dry.stdout


@pytest.mark.parametrize("block", ["engram train configs/tiny.yaml", *BLOCKS[2:]])
def test_every_command_runs(block: str, place: Path) -> None:
    commands = block.strip().splitlines()
    if "runs/tiny" in block:
        commands.insert(0, "engram train configs/tiny.yaml")
    for command in commands:
        if command != ". .venv/bin/activate":
            run(command, place)


def run(command: str, place: Path) -> None:
    words = shlex.split(command)
    training = words[:2] == ["engram", "train"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*words, *(SHORT if training else [])],
        cwd=place,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    if training:
        assert "validation loss" in result.stdout
