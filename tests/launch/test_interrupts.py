"""A signal ends every command at once, with one line, at whatever moment of its start it comes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.local.environment import may_use_gpus
from tests.launch.ranks import assert_gone
from tests.signals import skip_if_ignored

CONFIGS = Path(__file__).parents[2] / "configs"
TRAIN = ["train", CONFIGS / "tiny.yaml", "run.dir=runs", f"data.cache={CONFIGS.parent / 'data'}"]
COMMANDS: dict[str, list[str | Path]] = {
    "train": TRAIN,
    "json": [*TRAIN, "--json"],
    "plan": ["plan", CONFIGS / "paper" / "engram-27b.yaml"],
    "data": ["data", "prepare", Path(os.__file__).parent, "--out", "store", "--train-bpe", "4096", "--workers", "2"],
    "generate": ["generate", "run", "def"],
    "eval": ["eval", "run"],
    "tune": ["tune", *TRAIN[1:]],
}
LIMIT_S = 2.0
TOLD_BEFORE = (
    "starting ",
    "importing ",
    "waiting ",
    "reading ",
    "training a byte-level BPE",
    "tokenizing ",
    "building ",
)
"""How lines begin that `data prepare`, `tune` and `train --json` write to standard error while they start."""
MOMENTS = (0.0, 0.05, 0.15, 0.4, 1.0, 2.0, 4.0)


@contextmanager
def started(arguments: list[str | Path], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """The command, in a process group of its own as a shell starts it, once it listens to signals.

    Before, it is an interpreter that starts: Python's handler is there, and none of our code.
    """
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment, process_group=0
    ) as process:
        try:
            while process.poll() is None and not _listens(process.pid):
                time.sleep(0.001)
            yield process
        finally:
            process.kill()


def _listens(pid: int) -> bool:
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def _descendants(pid: int) -> list[int]:
    try:
        lists = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(child) for found in lists for child in found]
    return [*children, *(each for child in children for each in _descendants(child))]


def interrupt(arguments: list[str | Path], folder: Path, signum: int, moment_s: float) -> str:
    """Ends the command at that moment, as a terminal (SIGINT) or a scheduler does it; returns its standard output."""
    with started(arguments, folder) as process:
        time.sleep(moment_s)
        children = _descendants(process.pid)
        sent = time.monotonic()
        if signum == signal.SIGINT:
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        out, err = process.communicate(timeout=60)
        took_s = time.monotonic() - sent
    told = f"stopped by {signal.Signals(signum).name}\n"
    assert err.endswith(told), err
    assert all(line.startswith(TOLD_BEFORE) for line in err.removesuffix(told).splitlines()), err
    assert process.returncode == 128 + signum
    assert_gone(children, within_s=max(0.0, LIMIT_S - took_s))
    assert took_s < LIMIT_S, f"it took {took_s:.1f} s"
    return out


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that has what `eval` and `generate` look for before their imports, as `run`."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((CONFIGS / "tiny.yaml").read_text())
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
class TestAtAnyMoment:
    @pytest.mark.parametrize(
        ("command", "signum", "moment_s"),
        [
            ("train", signal.SIGINT, 0.05),
            ("train", signal.SIGTERM, 1.0),
            ("json", signal.SIGINT, 1.0),
            ("plan", signal.SIGINT, 0.4),
            ("data", signal.SIGINT, 2.0),
            ("generate", signal.SIGTERM, 0.4),
            ("tune", signal.SIGINT, 1.0),
        ],
    )
    def test_a_start_ends_with_one_line(self, command: str, signum: int, moment_s: float, saved: Path) -> None:
        skip_if_ignored(signum)
        out = interrupt(COMMANDS[command], saved, signum, moment_s)
        assert out == "" or command == "train"

    @pytest.mark.long
    @pytest.mark.parametrize("moment_s", MOMENTS)
    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("command", ["train", "json", "data", "tune"])
    def test_at_every_moment(self, command: str, signum: int, moment_s: float, saved: Path) -> None:
        skip_if_ignored(signum)
        interrupt(COMMANDS[command], saved, signum, moment_s)

    @pytest.mark.long
    @pytest.mark.parametrize("moment_s", [moment for moment in MOMENTS if moment <= 1])  # what later may have ended
    @pytest.mark.parametrize("command", ["plan", "generate", "eval"])
    def test_at_every_moment_of_imports(self, command: str, moment_s: float, saved: Path) -> None:
        skip_if_ignored(signal.SIGINT)
        interrupt(COMMANDS[command], saved, signal.SIGINT, moment_s)

    def test_help(self, tmp_path: Path) -> None:
        skip_if_ignored(signal.SIGINT)
        interrupt(["--help"], tmp_path, signal.SIGINT, 0.0)

    def test_a_signal_that_is_ignored_stays_so(self, tmp_path: Path) -> None:
        ignoring = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); import os; "
        ignoring += "os.execv(sys.executable, [sys.executable, '-m', 'launch', '--help'])"
        with subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE) as process:
            while process.poll() is None and not _listens(process.pid):
                time.sleep(0.001)
            process.send_signal(signal.SIGHUP)
            process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.skipif(may_use_gpus(), reason="says first that it counts the GPUs")
def test_the_first_line_comes_before_anything_heavy(tmp_path: Path) -> None:
    """The launcher loads no library of C++ that takes seconds, nor do the ranks before they have said so."""
    with started(TRAIN, tmp_path) as process:
        assert process.stdout is not None
        first, second = process.stdout.readline(), process.stdout.readline()
        assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    assert first.startswith("starting 2 rank(s) on the CPU; everything goes to runs")
    assert second == "importing PyTorch and DeepSpeed\n"


def test_a_rank_of_another_launcher_leaves_signals_to_the_system(tmp_path: Path) -> None:
    """Which ends it even within the C code of a library that it loads; that launcher tells how it ended."""
    skip_if_ignored(signal.SIGINT)
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_PORT"), "1") | {"MASTER_ADDR": "127.0.0.1"}
    ranks |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    with started(TRAIN, tmp_path, **ranks) as process:
        deadline = time.monotonic() + 30
        while _listens(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=LIMIT_S) == ("", "")
    assert process.returncode == -signal.SIGINT
