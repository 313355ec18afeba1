"""docs/data.md: its configs are valid and its commands run, as they stand there; jobs are cut to two steps."""

import re
import shlex
import sysconfig
from pathlib import Path

import pytest

from tests.command_line import engram
from train.config.file import load
from train.config.job import JobConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "data.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.strip().splitlines()]
CONFIGS = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))
SHORT = ["train.steps=2", "eval.sequences=4", "eval.sample_tokens=0", "checkpoint.every=null", "--nproc", "1"]
FOLDERS = {"my-texts": "[a-c]*.py", "my-code": "[d-f]*.py"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, pattern in FOLDERS.items():
        (folder / name).mkdir()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob(pattern)):
            (folder / name / path.name).write_bytes(path.read_bytes())
    for name, content in CONFIGS.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.long
def test_the_commands_of_the_page_run(place: Path) -> None:
    assert len(COMMANDS) > 12
    assert set(CONFIGS) == {"mixed.yaml", "phased.yaml"}
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "engram"
        result = engram(*words, *(SHORT if words[0] == "train" else []), cwd=place)
        assert result.returncode == 0, command + result.stderr
    job = load(place / "phased.yaml", [], JobConfig)
    assert [phase.after_steps for phase in job.data.phases] == [147, None]
