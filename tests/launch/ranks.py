"""Small programs that stand for a rank, and whether processes are still there."""

import json
import sys
import time
from pathlib import Path

PREAMBLE = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from launch.local.failures import reported
from train.errors import UserError
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
def leave_pid(pid=os.getpid(), name=f"rank{rank}"):
    (folder / f"{name}.part").write_text(str(pid))
    (folder / f"{name}.part").rename(folder / f"{name}.pid")
leave_pid()
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)
"""


def program(folder: Path, body: str) -> list[str]:
    """The command of a rank that runs `body` and has left its process id in `folder` before."""
    script = folder / "rank.py"
    script.write_text(PREAMBLE + body)
    return [sys.executable, str(script), str(folder)]


def launcher(command: list[str], folder: Path, nproc: int, grace_s: float) -> list[str]:
    """The command of a process that launches ranks."""
    code = (
        "import json, sys; from pathlib import Path\n"
        "from launch.local.signals import told_in_one_line; from launch.local.start import run_ranks\n"
        "with told_in_one_line():\n"
        "    ranks, logs, grace_s = int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])\n"
        "    code = run_ranks(json.loads(sys.argv[1]), ranks, log_folder=logs, grace_s=grace_s)\n"
        "sys.exit(code)"
    )
    return [sys.executable, "-c", code, json.dumps(command), str(nproc), str(folder / "logs"), str(grace_s)]


def pids(folder: Path, count: int) -> list[int]:
    """Waits until `count` processes have left their ids."""
    deadline = time.monotonic() + 30
    while len(found := list(folder.glob("*.pid"))) < count:
        assert time.monotonic() < deadline, f"only {found} started"
        time.sleep(0.01)
    return [int(path.read_text()) for path in found]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that is dead but not reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def assert_gone(processes: list[int], within_s: float = 0.0) -> None:
    """None of the processes runs, at the latest after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in processes if is_alive(pid)] == []
