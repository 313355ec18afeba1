"""The kernels' GPU tests under NVIDIA's compute-sanitizer: memcheck and racecheck, once a planted error was found.

In the root of a checkout, on a machine with a GPU and the CUDA toolkit:

    python -m tests.gpu.sanitizer --seconds 300
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from launch.bench.deadline import Deadline
from train.errors import UserError

_KERNELS = Path("tests/kernels")
_SANITIZER, _TOOLKIT = "compute-sanitizer", "/usr/local/cuda/bin"
_TOOLS = ("memcheck", "racecheck")
_FOUND = 99  # exit code of the sanitizer, when it found something
# Kernels of ours have such names; PyTorch's are mangled, and checking them as well takes many times as long.
OURS = "kns=^_[a-z]"
_ON_GPU = re.compile(r"\bkernel_device\b|\bmark\.gpu\b")
_PLANTED = "tests.kernels.planted"
_PASSED, _NO_TIME = "passed", "left out: no time was left"
_WORDS = 300


class Outcome(NamedTuple):
    """What became of a file of tests under a tool."""

    tool: str
    file: str
    status: str
    seconds: float = 0.0
    tests: int = 0
    skipped: int = 0
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing was found, as far as there was time to look."""
        return self.status in (_PASSED, _NO_TIME)

    def __str__(self) -> str:
        passed = self.tests - self.skipped - len(self.failures)
        counts = f"{passed} passed, {len(self.failures)} failed, {self.skipped} skipped"
        lines = [f"{self.tool} {self.file}: {self.status} ({counts}, {self.seconds:.0f} s)"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.failures])


def check(seconds: float | None) -> Iterator[Outcome]:
    """Runs the tests file by file under each tool.

    Raises:
        UserError: this is no checkout, compute-sanitizer is not installed, or a planted error is not found.
    """
    if not _KERNELS.is_dir():
        raise UserError(f"{_KERNELS}: not here; run this in the root of a checkout of the repository")
    sanitizer = _sanitizer()
    deadline = Deadline(seconds)
    planted = _run([*_command(sanitizer, "memcheck"), sys.executable, "-m", _PLANTED], deadline)
    if planted is None or planted.returncode != _FOUND:
        told = "no time was left" if planted is None else _last_line(planted.stdout)
        raise UserError(f"{sanitizer} does not find a planted error, so what it finds says nothing ({told})")
    for tool in _TOOLS:
        for file in files():
            yield _check_file(sanitizer, tool, file, deadline)


def files() -> list[Path]:
    """Those of the kernels' tests of which some need a GPU."""
    return [file for file in sorted(_KERNELS.rglob("test_*.py")) if _ON_GPU.search(file.read_text(encoding="utf-8"))]


def main() -> None:
    """Exits with 0 if nothing was found, with 1 if something was, and with 2 if nothing could be checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="leave out what does not fit into so much time")
    seconds = parser.parse_args().seconds
    clean = True
    try:
        for outcome in check(seconds):
            print(outcome, flush=True)
            clean = clean and outcome.clean
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if clean else 1)


def _sanitizer() -> str:
    found = shutil.which(_SANITIZER) or shutil.which(_SANITIZER, path=_TOOLKIT)
    if found is None:
        raise UserError(
            f"{_SANITIZER} is not installed: it comes with the CUDA toolkit; put the toolkit's bin into PATH"
        )
    return found


def _command(sanitizer: str, tool: str) -> tuple[str, ...]:
    options = ("--target-processes", "application-only", "--error-exitcode", str(_FOUND), "--kernel-regex", OURS)
    return (sanitizer, "--tool", tool, *options)


def _check_file(sanitizer: str, tool: str, file: Path, deadline: Deadline) -> Outcome:
    name = file.relative_to(_KERNELS).as_posix()
    if not deadline.allows(1.0):
        return Outcome(tool, name, _NO_TIME)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="engram-sanitizer-") as folder:
        report = Path(folder, "report.xml")
        pytest = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", str(file)]
        done = _run([*_command(sanitizer, tool), *pytest], deadline)
        seconds = time.monotonic() - started
        if done is None:
            return Outcome(tool, name, f"ended: it took longer than {seconds:.0f} s", seconds)
        tests, skipped, failures = _read_report(report)
        return Outcome(tool, name, _status(done, len(failures)), seconds, tests, skipped, failures)


def _status(done: "subprocess.CompletedProcess[str]", failures: int) -> str:
    if done.returncode == _FOUND:
        return f"ERRORS: {_summary(done.stdout)}"
    if done.returncode in (0, 5):  # 5: there is no such test
        return _PASSED
    return f"{failures} FAILED" if failures else f"FAILED: {_last_line(done.stdout)}"


def _run(command: list[str], deadline: Deadline) -> "subprocess.CompletedProcess[str] | None":
    """Both outputs in one; None if it did not end in time."""
    limit = None if deadline.left == float("inf") else max(1.0, deadline.left)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Every allocation by itself: the sanitizer sees where one ends.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        start_new_session=True,  # the sanitizer's own child is ended with it
    )
    try:
        told, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return subprocess.CompletedProcess(command, process.returncode, told)


def _read_report(report: Path) -> tuple[int, int, tuple[tuple[str, str], ...]]:
    """How many tests ran, how many were skipped, and name and reason of those that failed."""
    if not report.exists():
        return 0, 0, ()
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases), skipped, tuple(_failures(cases))


def _failures(cases: list[ElementTree.Element]) -> Iterator[tuple[str, str]]:
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                why = " ".join((found.get("message") or "").split())[:_WORDS]
                yield f"{case.get('classname')}.{case.get('name')}", why


def _summary(told: str) -> str:
    """The sanitizer's own last word."""
    found = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$", told, re.MULTILINE)
    return found[-1] if found else _last_line(told)


def _last_line(told: str) -> str:
    lines = told.strip().splitlines()
    return lines[-1][:_WORDS] if lines else "it said nothing"


if __name__ == "__main__":
    main()
