"""The process of one local rank.

It leads a process group of its own, so that what it starts ends with it, and on Linux the kernel kills it when the
launcher dies, even by SIGKILL.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from launch.local.failures import REPORT_FILE, RankReport

_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1


class RankProcess:
    """The process of a rank (or of what starts a host's ranks: `kind`), not reaped before `end`.

    Until then its process group's id cannot be reused. The first one writes to this process's own output, another one
    appends to `log`. `stdin` is empty, or a pipe whose end asks the process to end.
    """

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: dict[str, str],
        log: Path,
        report: Path,
        kind: str = "rank",
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.name, self.log, self._report = f"{kind} {number}", log if number else None, report
        self.code: int | None = None
        self.ended_at = 0.0
        output: IO[bytes] | None = self.log.open("ab") if self.log else None
        self._log_start = output.tell() if output else 0
        try:
            self._process = subprocess.Popen(
                command,
                env=environment | {REPORT_FILE: str(report)},
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=_dies_with(os.getpid()),
            )
        finally:
            if output:
                output.close()

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.code is None:
            ended = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                self.code = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                self.ended_at = time.time()
        return self.code

    def send(self, signum: int) -> None:
        """Signals the whole process group, which may outlive its leader."""
        # macOS answers with the second error for a group of which only zombies are left.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signum)

    def ask_to_end(self) -> None:
        """Asks it to end: by the end of its standard input where that is a pipe, else by SIGTERM.

        Never by the signal that this process received: what a rank does at SIGINT depends on how far it has started.
        """
        if self._process.stdin:
            self._process.stdin.close()
        else:
            self.send(signal.SIGTERM)

    def end(self) -> None:
        """Kills what is left of the group and reaps the process."""
        self.send(signal.SIGKILL)
        self._process.wait()

    @property
    def report(self) -> RankReport | None:
        """What the rank itself reported, if it did."""
        return RankReport.read(self._report)

    def told(self) -> str:
        """What is known about a failure: the traceback, or how the process ended and what it wrote last."""
        code, report = self.code or 0, self.report
        if report and "\n" not in report.text:
            return f"{self.name}: {report.text}"
        how = "failed" if report else f"failed (exit code {code})"
        if code < 0 and not report:
            how = f"was killed by {signal.Signals(-code).name}"
            how += ": was the machine out of memory?" if code == -signal.SIGKILL else ""
        place = f"; its log: {self.log}" if self.log else ""
        shown = report.text if report else self._log_tail()
        return f"{self.name} {how}{place}" + (f"\n{shown}" if shown else "")

    def _log_tail(self) -> str:
        if self.log is None:
            return ""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return "\n".join(log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:])


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Between fork and exec: asks the kernel for SIGKILL when the parent dies; None where it cannot (not Linux)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask
