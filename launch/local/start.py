"""Starts processes, shows the first one, and leaves none behind however they end: the ranks of this machine."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.local.environment import meeting_port, rank_environment
from launch.local.failures import USER_ERROR_EXIT, RankFailed
from launch.local.process import RankProcess
from launch.local.signals import Received, Stopped, collected
from train.errors import UserError
from train.watch.ending import SAME_S

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
) -> int:
    """Runs `command` as `nproc` ranks that meet on `port` (None: a free one) and waits for all of them.

    Rank 0's output is this process's own; the others append to `log_folder/rank<n>.log`. When one rank fails, the
    others are killed. When a signal asks this process to end, they are asked as well, by SIGTERM, and killed after
    `grace_s` seconds or by a later Ctrl-C; what comes within `SAME_S` is the same Ctrl-C.

    Returns:
        0 if all ranks did their work, or the exit code of ranks that were interrupted and have saved theirs.

    Raises:
        UserError: the port is in use, the log folder cannot be made, or a rank reported a user's mistake.
        RankFailed: a rank crashed.
        Stopped: a signal asked this process to end, and the ranks have not saved their work.
    """
    meeting = meeting_port(port)
    starts = [(command, rank_environment(rank, nproc, meeting, gpus)) for rank in range(nproc)]
    return Processes(grace_s).run(starts, log_folder)


class Processes:
    """What is started together: ranks, or with another `kind` what starts ranks elsewhere (`launch.cluster.processes`).

    Args:
        grace_s: seconds that they have to end when they are asked to.
        may_fail: up to so many of them may fail.
        stdin: their standard input is empty, or with `subprocess.PIPE` one that ends when this process does, or when
            they are asked to end.
    """

    kind = "rank"
    """What messages and logs call one."""

    def __init__(self, grace_s: float, *, may_fail: int = 0, stdin: int = subprocess.DEVNULL) -> None:
        self.grace_s, self._may_fail, self._stdin = grace_s, may_fail, stdin
        self.ranks: list[RankProcess] = []
        self.received: list[Received] = []

    def run(self, starts: Sequence[tuple[Sequence[str], dict[str, str]]], log_folder: Path) -> int:
        """Runs commands, each in its environment, as `run_ranks` does its ranks, and leaves none behind.

        Returns:
            See `run_ranks`.

        Raises:
            UserError: the log folder cannot be made, or a process reported a user's mistake.
            RankFailed: a process crashed.
            Stopped: a signal asked this process to end.
        """
        try:
            log_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{log_folder}: cannot create the folder for logs ({error.strerror})") from None
        with tempfile.TemporaryDirectory(prefix="engram-") as reports, collected() as self.received:
            try:
                for number, (command, environment) in enumerate(starts):
                    log, report = log_folder / f"{self.kind}{number}.log", Path(reports, str(number))
                    rank = RankProcess(number, command, environment, log, report, self.kind, self._stdin)
                    self.ranks.append(rank)
                return self._wait()
            finally:
                for rank in self.ranks:
                    rank.end()
                if sys.stdout.isatty():
                    print(_SHOW_CURSOR, end="", flush=True)  # rank 0's live bar hides it, and may have been killed

    def ask_to_end(self) -> None:
        """Asks all to end: a signal asked this process."""
        for rank in self.ranks:
            rank.poll()
            rank.ask_to_end()

    def before_the_end(self) -> None:
        """Called when one has failed, before the others are killed."""

    def _wait(self) -> int:
        self.until(lambda: bool(self.received or len(self._failed()) > self._may_fail or self._interrupted()))
        if self.received:
            self.ask_to_end()
        if self.received or self._interrupted():
            self.until(lambda: bool(self._insisted() or self._culprits()), self.grace_s)
        if interrupted := self._interrupted():
            return interrupted[0].poll() or 0
        if self.received:
            if not self._culprits() and any(rank.poll() != 0 for rank in self.ranks):
                raise Stopped(self.received[0].signum)
        elif len(self._failed()) > self._may_fail:
            self.until(lambda: bool(self.received or self._culprits()), _SETTLE_S)
        if len(failed := self._failed()) > self._may_fail:
            self.before_the_end()
            self._raise(min(failed, key=_blame))
        return 0

    def _failed(self) -> list[RankProcess]:
        """Ranks that reported a failure, or ended with another exit code than 0."""
        return [
            rank for rank in self.ranks if (report.kind != "interrupted" if (report := rank.report) else rank.poll())
        ]

    def _culprits(self) -> list[RankProcess]:
        """Those whose failure did not follow from another's; a rank that was asked to end may do so with any code."""
        return [rank for rank in self._failed() if _blame(rank)[0] < 2 and (rank.report or not self.received)]

    def _interrupted(self) -> list[RankProcess]:
        ended = [rank for rank in self.ranks if rank.poll() is not None]
        return [rank for rank in ended if (report := rank.report) and report.kind == "interrupted"]

    def _insisted(self) -> bool:
        """Whether somebody pressed Ctrl-C again, after the first signal and all that belong to it."""
        first = self.received[0].at if self.received else 0.0
        return any(signum == signal.SIGINT and at - first >= SAME_S for signum, at in self.received)

    def until(self, happened: Callable[[], bool], timeout_s: float = float("inf")) -> None:
        """Sleeps until something `happened` or all ranks have ended, `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        while not happened() and any(rank.poll() is None for rank in self.ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

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
