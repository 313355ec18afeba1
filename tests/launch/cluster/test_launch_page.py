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
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "launch.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
OURS = [command for command in COMMANDS if command.startswith("engram ")]
THEIRS = [command for command in COMMANDS if command.startswith(("torchrun ", "mpirun "))]
SLURMS = [command for command in COMMANDS if command.startswith("srun ")]
"""Run by `test_slurm.py`."""


def test_every_command_of_the_page_is_run() -> None:
    assert sorted(OURS + THEIRS + SLURMS) == sorted(COMMANDS)
    assert len(OURS) > 8
    assert len(THEIRS) == 3
    assert len(SLURMS) == 2


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
