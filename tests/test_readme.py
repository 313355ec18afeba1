"""The README's commands, run as they stand there (what takes long is cut short)."""

import re
import shlex
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import engram, fresh_engram

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
SHORT_TRAINING = ["train.steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "data.sequence_length=64"]
SHORTER = {
    "train": [*SHORT_TRAINING, "eval.sequences=4", "eval.sample_tokens=2", f"data.cache={ROOT / 'data'}"],
    "eval": ["--sequences", "4"],
    "plan": ["train.global_batch_size=16", "data.sequence_length=64"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to stand in: the repository's configs, somebody's texts, and modules that nobody means."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("train", "model", "launch"):
        (folder / f"{name}.py").write_text("raise ImportError('the wrong module')")
    (folder / "my-texts").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py")):
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


def test_every_command_runs(place: Path) -> None:
    """In the order in which they stand there; what `make train` starts as a user does, the rest in warm processes."""
    run("engram train configs/tiny.yaml", place, fresh_engram)
    for command in COMMANDS[2:]:
        if command != ". .venv/bin/activate":
            run(command, place, engram)


def run(command: str, place: Path, start: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program, *words = shlex.split(command)
    assert program == "engram"
    training = words[0] == "train"
    result = start(*words, *SHORTER.get(words[0], []), cwd=place)
    assert result.returncode == 0, (command, result.stderr)
    if training:
        assert "validation loss" in result.stdout
