"""docs/serve.md: its commands run, as they stand there; the job is cut to two steps."""

import re
import shlex
import sysconfig
from pathlib import Path

import pytest

from tests.command_line import engram

TEXT = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.strip().splitlines()]
(CODE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
SHORT = ["train.steps=2", "eval.every=2", "checkpoint.every=null", "--nproc", "1"]


@pytest.mark.long
def test_the_commands_of_the_page_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").symlink_to(trained)
    (tmp_path / "my-texts").mkdir()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-c]*.py")):
        (tmp_path / "my-texts" / path.name).write_bytes(path.read_bytes())
    assert [shlex.split(command)[:2] for command in COMMANDS] == [
        ["engram", "export"],
        ["engram", "data"],
        ["engram", "train"],
    ]
    for command in COMMANDS:
        words = shlex.split(command)[1:]
        result = engram(*words, *(SHORT if words[0] == "train" else []), cwd=tmp_path)
        assert result.returncode == 0, command + result.stderr
    monkeypatch.chdir(tmp_path)
    exec(CODE)
    assert "def main(" in capsys.readouterr().out
