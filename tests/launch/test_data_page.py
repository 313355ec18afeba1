"""docs/data.md: its configs are valid and its commands run, as they stand there; jobs are cut to two steps."""

import json
import re
import shlex
import sysconfig
from pathlib import Path

import pytest
import zstandard

from tests.command_line import engram
from tests.train.data.server import serving
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
    return folder


@pytest.mark.long
def test_the_commands_of_the_page_run(place: Path) -> None:
    assert len(COMMANDS) > 12
    assert set(CONFIGS) == {"elsewhere.yaml", "mixed.yaml", "phased.yaml"}
    with serving() as server:

        def here(text: str) -> str:
            return text.replace("https://example.org", server.url)

        for name, content in CONFIGS.items():
            (place / name).write_text(here(content))
        lines = "".join(json.dumps({"text": path.read_text()}) + "\n" for path in (place / "my-code").iterdir())
        server.files["/corpus.jsonl.zst"] = zstandard.compress(lines.encode())
        # The page tells of stores by URL before it makes the one that its example reads.
        for command in sorted(COMMANDS, key=lambda line: "prepare my-" not in line):
            program, *words = shlex.split(here(command))
            assert program == "engram"
            result = engram(*words, *(SHORT if words[0] == "train" else []), cwd=place)
            assert result.returncode == 0, command + result.stderr
            for path in (place / "data" / "web").iterdir():
                server.files[f"/stores/web/{path.name}"] = path.read_bytes()
    assert any((place / "cache" / "shards").rglob("*.shard"))
    job = load(place / "phased.yaml", [], JobConfig)
    assert [phase.after_steps for phase in job.data.phases] == [147, None]
