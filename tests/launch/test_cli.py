import errno
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import train.data.preparation.prepare
from launch.cli import main
from launch.local.failures import RankFailed
from tests.command_line import engram, invoke, write_job
from train.errors import UserError

TINY_JOB = {"train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}}


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared token store, made by the command itself, whose whole standard output is the manifest."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Document {number} says: " + "the cat sat on the mat, and so on. " * 8)
    result = engram(
        "data", "prepare", folder, "--out", folder / "store", "--train-bpe", "300", "--workers", "1", "--json"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["documents"] == 40
    return folder / "store"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from launch.cli import main; main(['--help'], standalone_mode=False)\n"
        "sys.exit(', '.join({'torch', 'numpy', 'pydantic', 'deepspeed', 'wandb'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "data" in result.stdout


@pytest.mark.parametrize("group", [[], ["bench"], ["checkpoint"], ["data"]])
def test_lists_of_commands_say_in_a_line_what_each_does(group: list[str]) -> None:
    result = CliRunner().invoke(main, [*group, "--help"], terminal_width=80)
    assert "..." not in result.stdout.partition("Commands:")[2]


@pytest.mark.parametrize("words", commands(main), ids=" ".join)
def test_every_command_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    assert f"  engram {' '.join(words)} " in result.stdout.partition("Example")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], "No such command 'tarin'; did you mean `engram train`?"),
        (["xyz"], "No such command 'xyz'; there are: "),
        (["--quick"], "No such option '--quick'."),
        (["train"], "Missing argument 'CONFIG'. (see `engram train --help`)"),
        (["train", "x.yaml", "--nproc", "0"], "Invalid value for '--nproc'"),
        (["train", "x.yaml"], "x.yaml: no such file or directory"),
        (["data", "prepare", "x", "--out", "y"], "Give one of --tokenizer and --train-bpe."),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"Error: {message}")


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("no text\n anywhere"), 2, "Error: no text anywhere\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/d"), 2, "Error: /d: no space left on device; make room"),
        (RankFailed("rank 1 failed\nTraceback: ..."), 1, "Error: rank 1 failed\nTraceback: ...\n"),
    ],
)
def test_expected_failures_are_told_without_a_traceback(
    error: Exception, code: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(train.data.preparation.prepare, "prepare", fails)
    result = invoke("data", "prepare", "x", "--out", "y", "--train-bpe", "300")
    assert result.exit_code == code
    assert result.stderr.startswith(shown)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.data.preparation.prepare, "prepare", lambda *args, **kwargs: [].index(1))
    result = invoke("data", "prepare", "x", "--out", "y", "--train-bpe", "300")
    assert isinstance(result.exception, ValueError)


def test_mistakes_in_a_job_are_told_before_any_rank_starts(corpus: Path, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        job = write_job(tmp_path, corpus)
        for override, message in (
            ("offload.detph=3", "command line: offload.detph: unknown key; did you mean offload.depth? (allowed: "),
            (f"run.port={port}", f"port {port}: already in use"),
            (f"data.path={tmp_path / 'no-data'}", "no-data: no prepared folder and no .bin/.idx pair there"),
        ):
            result = engram("train", job, override)
            assert (result.returncode, result.stdout) == (2, "")
            assert len(result.stderr.splitlines()) == 1
            assert message in result.stderr
    assert not (tmp_path / "runs").exists()


def test_what_a_rank_finds_wrong_is_told_once(corpus: Path, tmp_path: Path) -> None:
    result = engram("train", write_job(tmp_path, corpus), "offload.window_rows=10", "--nproc", "2")
    assert result.returncode == 2
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert "set offload.window_rows=" in told[0]
    assert "Traceback" not in result.stderr


def test_json_is_all_of_a_job_s_output(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus, **TINY_JOB)
    result = engram("train", job, "--nproc", "2", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["steps"] == 2
    assert summary["val_loss"] > 0
    assert "step 2/2  loss " in result.stderr
    assert (tmp_path / "runs" / "small" / "logs" / "rank1.log").exists()


def test_under_another_launcher_it_is_one_of_its_ranks(corpus: Path, tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job = write_job(tmp_path, corpus, **TINY_JOB)
    result = engram("train", job, DS_ACCELERATOR="cpu", **ranks)
    assert result.returncode == 0, result.stderr
    assert "step 2/2  loss " in result.stdout
    assert not (tmp_path / "runs" / "small" / "logs").exists()
    assert engram("train", job, "--nproc", "2", **ranks).returncode == 2
