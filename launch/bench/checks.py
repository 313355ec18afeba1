"""Parts `tests` and `sanitizer`: the checkout's GPU tests, by themselves and under NVIDIA's compute-sanitizer."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from launch.bench.deadline import Deadline
from launch.bench.options import BenchOptions
from launch.bench.progress import Progress
from launch.bench.report import Cell, Measure, Section
from train.errors import UserError
from train.machine import usable_cores

_TESTS = Path("tests")
_FOLDERS = ("kernels", "offload", "model", "train", "launch")
_WORKERS = 8
"""Processes that run tests side by side: most of their time goes into compiling kernels, on the host."""
_SANITIZER, _TOOLKIT = "compute-sanitizer", "/usr/local/cuda/bin"
_FOUND = 99  # exit code of the sanitizer, when it found something
# Kernels of ours have such names; PyTorch's are mangled, and checking them as well takes many times as long.
_OURS = "kns=^_[a-z]"
_PLANTED = "tests.kernels.planted"
_NO_TIME = "left out: no time was left"
_WORDS = 300


def run_tests(options: BenchOptions, progress: Progress) -> dict[str, Section]:
    """Runs `pytest -m gpu`, folder by folder.

    Raises:
        UserError: this is no checkout, or pytest is not installed.
    """
    _require_checkout()
    deadline = Deadline(options.seconds)
    folders = [_TESTS / name for name in _FOLDERS if (_TESTS / name).is_dir()]
    progress.expect(len(folders))
    rows: list[dict[str, Cell]] = []
    failures: list[dict[str, Cell]] = []
    workers = ("-n", str(min(_WORKERS, max(1, usable_cores() // 2)))) if find_spec("xdist") else ()
    for folder in folders:
        outcome = _pytest((), (str(folder), *workers), deadline)
        rows.append({"folder": str(folder), **outcome.counts(), "status": outcome.status})
        failures += [{"test": name, "why": why} for name, why in outcome.failures]
        progress.advance()
    failed = sum(row["status"] != "passed" for row in rows)
    sections = {"tests": Section("Tests on the GPU", rows, [Measure("folders that did not pass", failed, 0)])}
    return sections | ({"failures": Section("Tests that failed", failures)} if failures else {})


def run_sanitizer(options: BenchOptions, progress: Progress) -> dict[str, Section]:
    """Runs the kernels' GPU tests under memcheck and racecheck, once a planted error was found.

    Raises:
        UserError: this is no checkout, pytest or compute-sanitizer is not installed, or a planted error is not found.
    """
    _require_checkout()
    sanitizer = _sanitizer()
    deadline = Deadline(options.seconds)
    planted = _run([*_command(sanitizer, "memcheck"), sys.executable, "-m", _PLANTED], deadline)
    if planted is None or planted.returncode != _FOUND:
        told = "no time was left" if planted is None else _last_line(planted.stdout)
        raise UserError(f"{sanitizer} does not find a planted error, so what it finds says nothing ({told})")
    files = sorted((_TESTS / "kernels").glob("test_*_triton.py"))
    progress.expect(2 * len(files))
    rows: list[dict[str, Cell]] = []
    for tool in ("memcheck", "racecheck"):
        for file in files:
            outcome = _pytest(_command(sanitizer, tool), (str(file),), deadline)
            rows.append({"tool": tool, "file": file.name, **outcome.counts(), "status": outcome.status})
            progress.advance()
    dirty = sum(row["status"] not in ("passed", _NO_TIME) for row in rows)
    return {
        "sanitizer": Section(
            "Kernel tests under compute-sanitizer",
            rows,
            [Measure("files with errors", dirty, 0)],
            ["a planted write behind the end of a tensor was found; kernels of PyTorch are not checked"],
        )
    }


class _Outcome(NamedTuple):
    status: str
    seconds: float
    tests: int = 0
    skipped: int = 0
    failures: tuple[tuple[str, str], ...] = ()

    def counts(self) -> dict[str, Cell]:
        passed = self.tests - self.skipped - len(self.failures)
        return {"passed": passed, "failed": len(self.failures), "skipped": self.skipped, "seconds": self.seconds}


def _require_checkout() -> None:
    if not (_TESTS / "kernels").is_dir():
        raise UserError(f"{_TESTS}/kernels: not here; run this in the root of a checkout of the repository")
    if find_spec("pytest") is None:
        raise UserError("pytest is not installed: pip install pytest")


def _sanitizer() -> str:
    found = shutil.which(_SANITIZER) or shutil.which(_SANITIZER, path=_TOOLKIT)
    if found is None:
        raise UserError(
            f"{_SANITIZER} is not installed: it comes with the CUDA toolkit; put the toolkit's bin into PATH"
        )
    return found


def _command(sanitizer: str, tool: str) -> tuple[str, ...]:
    options = ("--target-processes", "application-only", "--error-exitcode", str(_FOUND), "--kernel-regex", _OURS)
    return (sanitizer, "--tool", tool, *options)


def _pytest(prefix: tuple[str, ...], arguments: tuple[str, ...], deadline: Deadline) -> _Outcome:
    if not deadline.allows(1.0):
        return _Outcome(_NO_TIME, 0.0)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="engram-tests-") as folder:
        report = Path(folder, "report.xml")
        command = [*prefix, sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *arguments]
        done = _run(command, deadline)
        seconds = time.monotonic() - started
        if done is None:
            return _Outcome(f"ended: it took longer than {seconds:.0f} s", seconds)
        tests, skipped, failures = _read_report(report)
        status = _status(done, bool(prefix), len(failures))
        return _Outcome(status, seconds, tests, skipped, failures)


def _status(done: "subprocess.CompletedProcess[str]", sanitized: bool, failures: int) -> str:
    if sanitized and done.returncode == _FOUND:
        return f"ERRORS: {_summary(done.stdout)}"
    if done.returncode in (0, 5):  # 5: there is no such test
        return "passed"
    return f"{failures} FAILED" if failures else f"FAILED: {_last_line(done.stdout)}"


def _run(command: list[str], deadline: Deadline) -> "subprocess.CompletedProcess[str] | None":
    """Both outputs in one; None if it did not end in time."""
    # Every allocation by itself: the sanitizer sees where one ends.
    environment = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if _SANITIZER in command[0] else {})
    limit = None if deadline.left == float("inf") else max(1.0, deadline.left)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        told, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
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
