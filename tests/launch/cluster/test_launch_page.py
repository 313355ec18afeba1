"""The commands of docs/launch.md, as they stand there; jobs are made small, and what has no engine here is printed."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.command_line import engram, write_job
from tests.launch.cluster.test_started import MPIRUN, started_by

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "launch.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
OURS = [command for command in COMMANDS if command.startswith("engram ")]
ON_HOSTS = [command for command in COMMANDS if command.startswith(("torchrun --nnodes", "mpirun -np 16"))]
"""Run by `test_two_hosts.py`."""
THEIRS = [command for command in COMMANDS if command.startswith(("torchrun ", "mpirun ")) and command not in ON_HOSTS]
SLURMS = [command for command in COMMANDS if command.startswith("srun ")]
"""Run by `test_slurm.py`."""


def test_every_command_of_the_page_is_run() -> None:
    assert sorted(OURS + THEIRS + ON_HOSTS + SLURMS) == sorted(COMMANDS)
    assert len(OURS) > 8
    assert (len(THEIRS), len(ON_HOSTS), len(SLURMS)) == (3, 2, 2)


def test_symptoms_are_in_the_words_of_the_code() -> None:
    """What stands for a number, a name or a host is left out."""
    code = [path.read_text() for folder in ("launch", "train") for path in (ROOT / folder).rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(code))
    symptoms = [line.split("|")[1] for line in PAGE.partition("## Troubleshooting")[2].splitlines() if "|" in line]
    messages = [text for symptom in symptoms for text in re.findall("`([^`]* [^`]*)`", symptom)]
    told = [text for text in messages if not text.startswith("PENDING")]  # that is Slurm's
    assert len(told) > 10
    for text in told:
        missing = [part for part in re.split(r"\.\.\.|HOST|\d+", text) if part.strip() not in joined]
        assert not missing, (text, missing)


def test_variables_of_our_own_are_on_the_page() -> None:
    code = "\n".join(path.read_text() for path in (ROOT / "launch").rglob("*.py"))
    names = set(re.findall(r'"(ENGRAM_[A-Z_]+)"', code))
    assert len(names) >= 4
    assert [name for name in sorted(names) if f"| `{name}` |" not in PAGE] == []


@pytest.mark.parametrize("command", OURS)
def test_our_commands_run(command: str) -> None:
    words = shlex.split(command)[1:]
    dry = ["--dry-run"] if words[0] == "launch" and "--dry-run" not in words else []
    result = engram(*words, *dry, cwd=ROOT, DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stderr
    assert not (ROOT / "runs" / "tiny" / "launches").exists()


@pytest.mark.long
@pytest.mark.parametrize("command", THEIRS)
def test_commands_of_other_launchers_run(command: str, corpus: Path, tmp_path: Path) -> None:
    program, *words = shlex.split(command)
    if shutil.which(program, path=os.environ["PATH"]) is None and program == "mpirun":
        pytest.skip("needs mpirun")
    job = str(write_job(tmp_path, corpus))
    small = [job if word == "configs/tiny.yaml" else word for word in words]
    # Open MPI wants to be told where it may not find two cores, or runs as root.
    result = started_by(*(MPIRUN + small[2:] if program == "mpirun" else [program, *small]))
    assert result.returncode == 0, result.stderr
    assert "validation loss " in result.stdout
