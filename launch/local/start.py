"""Starts the ranks of this machine, shows the first one, and leaves none behind however they end."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from launch.local.environment import meeting_port, rank_environment
from launch.local.failures import USER_ERROR_EXIT, RankFailed
from launch.local.process import RankProcess
from launch.local.signals import Stopped, collected
from train.errors import UserError

_POLL_S = 0.05
_SETTLE_S = 3.0
_FAULTS = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
_SHOW_CURSOR = "\x1b[?25h"


def run_ranks(
    command: Sequence[str],
    nproc: int,
    *,
    log_folder: Path,
    port: int | None = None,
    gpus: int = 0,
    grace_s: float = 10.0,
) -> None:
    """Runs `command` as `nproc` ranks that meet on `port` (None: a free one) and waits for all of them.

    Rank 0's output is this process's own; the others append to `log_folder/rank<n>.log`. When one rank fails, the
    others are ended (SIGTERM, after `grace_s` seconds SIGKILL). So are all of them when this process is asked to end
    by SIGINT, SIGTERM or SIGHUP; a second signal kills them at once. Always SIGTERM: Python's own handler of SIGINT
    would raise an exception in the middle of a rank's imports.

    Raises:
        UserError: the port is in use, the log folder cannot be made, or a rank reported a user's mistake.
        RankFailed: a rank crashed.
        Stopped: a signal asked this process to end.
    """
    meeting = meeting_port(port)
    starts = [(command, rank_environment(rank, nproc, meeting, gpus)) for rank in range(nproc)]
    run_processes(starts, log_folder=log_folder, grace_s=grace_s)


def run_processes(
    starts: Sequence[tuple[Sequence[str], dict[str, str]]],
    *,
    log_folder: Path,
    grace_s: float,
    kind: str = "rank",
    stdin: int = subprocess.DEVNULL,
    may_fail: int = 0,
) -> None:
    """Runs commands, each in its environment, as `run_ranks` does its ranks; so many as `may_fail` may fail.

    Their standard input is empty, or with `stdin=subprocess.PIPE` one that ends when this process does.

    Raises:
        UserError: the log folder cannot be made, or a process reported a user's mistake.
        RankFailed: a process crashed; `kind` is what messages and logs call it.
        Stopped: a signal asked this process to end.
    """
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{log_folder}: cannot make the folder for logs ({error.strerror})") from None
    with (
        tempfile.TemporaryDirectory(prefix="engram-") as reports,
        collected() as received,
        _LocalRanks(log_folder, Path(reports), grace_s, received, kind) as ranks,
    ):
        for command, environment in starts:
            ranks.start(command, environment, stdin)
        ranks.wait(may_fail)


class _LocalRanks:
    """All ranks of a run, as a context in which they live."""

    def __init__(self, log_folder: Path, reports: Path, grace_s: float, received: list[int], kind: str) -> None:
        self._log_folder, self._reports, self._grace_s, self._received = log_folder, reports, grace_s, received
        self._kind = kind
        self._ranks: list[RankProcess] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for rank in self._ranks:
            rank.end()
        if sys.stdout.isatty():
            print(_SHOW_CURSOR, end="", flush=True)  # rank 0's live bar hides it, and may have been killed

    def start(self, command: Sequence[str], environment: dict[str, str], stdin: int) -> None:
        """Starts the next rank."""
        number = len(self._ranks)
        log, report = self._log_folder / f"{self._kind}{number}.log", self._reports / str(number)
        self._ranks.append(RankProcess(number, command, environment, log, report, self._kind, stdin))

    def wait(self, may_fail: int) -> None:
        """Returns when all ranks but `may_fail` succeeded; otherwise ends the rest and raises."""

        def too_many_failed() -> bool:
            return sum(bool(rank.poll()) for rank in self._ranks) > may_fail

        self._until(lambda: bool(self._received) or too_many_failed())
        if not self._received and too_many_failed():
            self._until(self._culprit_is_clear, _SETTLE_S)
            culprit = min((rank for rank in self._ranks if rank.report or rank.poll()), key=_blame)
            self._stop()
            self._raise(culprit)
        if self._received:
            self._stop()
            raise Stopped(self._received[0])

    def _until(self, happened: Callable[[], bool], timeout_s: float = float("inf")) -> None:
        """Sleeps until something `happened` or all ranks have ended, `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        while not happened() and any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _culprit_is_clear(self) -> bool:
        return bool(self._received) or any(_blame(rank)[0] < 2 for rank in self._ranks if rank.report or rank.poll())

    def _stop(self) -> None:
        """Asks all ranks to end and waits for them through the grace time, or until another signal comes."""
        known = len(self._received)
        for rank in self._ranks:
            rank.poll()
            rank.send(signal.SIGTERM)
        self._until(lambda: len(self._received) > known, self._grace_s)

    def _raise(self, culprit: RankProcess) -> None:
        if (report := culprit.report) is not None and report.kind == "user":
            raise UserError(report.text)
        if culprit.poll() == USER_ERROR_EXIT and report is None:
            raise UserError(culprit.told())
        raise RankFailed(culprit.told())


def _blame(rank: RankProcess) -> tuple[int, float]:
    """Sorts failed ranks: machine faults first, then by time; aborts and lost connections follow from another's."""
    report = rank.report
    if report is not None:
        return (2 if report.kind == "peer" else 1), report.time
    if rank.code in _FAULTS:
        return 0, rank.ended_at
    return (2 if rank.code == -signal.SIGABRT else 1), rank.ended_at
