"""Starts the ranks of this machine, shows the first one, and leaves none behind however they end."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from launch.local.environment import meeting_port, rank_environment
from launch.local.failures import USER_ERROR_EXIT, RankFailed
from launch.local.process import RankProcess
from launch.local.signals import Received, Stopped, collected
from train.errors import UserError
from train.watch.ending import SAME_S

_POLL_S = 0.05
_SETTLE_S = 3.0
_FAULTS = {-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}
_WAITING = "waiting {:g} s at most for the ranks to save and end; Ctrl-C again does not"
_OTHERS = "a host failed: waiting {:g} s at most for the ranks on the others to end; Ctrl-C does not"
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
    return run_processes(starts, log_folder=log_folder, grace_s=grace_s)


def run_processes(
    starts: Sequence[tuple[Sequence[str], dict[str, str]]],
    *,
    log_folder: Path,
    grace_s: float,
    kind: str = "rank",
    stdin: int = subprocess.DEVNULL,
    may_fail: int = 0,
    ask: Sequence[str] = (),
) -> int:
    """Runs commands, each in its environment, as `run_ranks` does its ranks; up to `may_fail` of them may fail.

    Their standard input is empty, or with `stdin=subprocess.PIPE` one that ends when this process does, or when they
    are asked to end: no signal reaches what they have started elsewhere. `ask` is a command that asks that to end, in
    place of a signal to them. Of the kind `host`, they have `grace_s` seconds to end when another one fails.

    Returns:
        See `run_ranks`.

    Raises:
        UserError: the log folder cannot be made, or a process reported a user's mistake.
        RankFailed: a process crashed; `kind` is what messages and logs call it.
        Stopped: a signal asked this process to end.
    """
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{log_folder}: cannot create the folder for logs ({error.strerror})") from None
    with (
        tempfile.TemporaryDirectory(prefix="engram-") as reports,
        collected() as received,
        _LocalRanks(log_folder, Path(reports), grace_s, received, kind, ask) as ranks,
    ):
        for command, environment in starts:
            ranks.start(command, environment, stdin)
        return ranks.wait(may_fail)


class _LocalRanks:
    """All ranks of a run, as a context in which they live."""

    def __init__(
        self,
        log_folder: Path,
        reports: Path,
        grace_s: float,
        received: list[Received],
        kind: str,
        ask: Sequence[str],
    ) -> None:
        self._log_folder, self._reports, self._grace_s, self._received = log_folder, reports, grace_s, received
        self._kind, self._ask = kind, ask
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

    def wait(self, may_fail: int) -> int:
        """See `run_processes`."""
        self._until(lambda: bool(self._received or len(self._failed()) > may_fail or self._interrupted()))
        if self._received:
            self._ask_to_end()
        if self._received or self._interrupted():
            self._until(lambda: bool(self._insisted() or self._culprits()), self._grace_s)
        if interrupted := self._interrupted():
            return interrupted[0].poll() or 0
        if self._received:
            if not self._culprits() and any(rank.poll() != 0 for rank in self._ranks):
                raise Stopped(self._received[0].signum)
        elif len(self._failed()) > may_fail:
            self._until(lambda: bool(self._received or self._culprits()), _SETTLE_S)
        if len(failed := self._failed()) > may_fail:
            if self._kind == "host":
                self._wait_for_the_others()
            self._raise(min(failed, key=_blame))
        return 0

    def _failed(self) -> list[RankProcess]:
        """Ranks that reported a failure, or ended with another exit code than 0."""
        return [
            rank for rank in self._ranks if (report.kind != "interrupted" if (report := rank.report) else rank.poll())
        ]

    def _culprits(self) -> list[RankProcess]:
        """Those whose failure did not follow from another's; a rank that was asked to end may do so with any code."""
        return [rank for rank in self._failed() if _blame(rank)[0] < 2 and (rank.report or not self._received)]

    def _interrupted(self) -> list[RankProcess]:
        ended = [rank for rank in self._ranks if rank.poll() is not None]
        return [rank for rank in ended if (report := rank.report) and report.kind == "interrupted"]

    def _insisted(self) -> bool:
        """Whether somebody pressed Ctrl-C again, after the first signal and all that belong to it."""
        first = self._received[0].at if self._received else 0.0
        return any(signum == signal.SIGINT and at - first >= SAME_S for signum, at in self._received)

    def _ask_to_end(self) -> None:
        if self._kind == "host":
            print(_WAITING.format(self._grace_s), file=sys.stderr, flush=True)
        if self._ask:
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(self._ask, stdin=subprocess.DEVNULL, timeout=self._grace_s, check=False)
            return
        for rank in self._ranks:
            rank.poll()
            rank.ask_to_end()

    def _wait_for_the_others(self) -> None:
        """What they started elsewhere does not end with a connection that is killed: the next start would meet it."""
        if self._received or all(rank.poll() is not None for rank in self._ranks):
            return
        print(_OTHERS.format(self._grace_s), file=sys.stderr, flush=True)
        for rank in self._ranks:
            rank.ask_to_end()
        self._until(lambda: bool(self._received), self._grace_s)

    def _until(self, happened: Callable[[], bool], timeout_s: float = float("inf")) -> None:
        """Sleeps until something `happened` or all ranks have ended, `timeout_s` seconds at most."""
        deadline = time.monotonic() + timeout_s
        while not happened() and any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
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
