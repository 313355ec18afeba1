"""The `engram` command and its ranks in warm processes: the launcher is the real one, only `exec` is left out."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, NoReturn

from tests.warm import warm_process


def run_warm(
    arguments: list[str], *, cwd: Path | None, timeout_s: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Runs `engram` with these arguments to its end."""
    with started_warm(arguments, cwd=cwd, environment=environment) as command:
        return command.result(timeout_s)


@dataclass(frozen=True)
class WarmCommand:
    """A command that was started, its process, and the files that it writes to."""

    arguments: list[str]
    process: ForkServerProcess
    output: Path
    errors: Path

    def result(self, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Waits for its end."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(
                self.arguments, timeout_s, self.output.read_bytes(), self.errors.read_bytes()
            )
        told = self.output.read_text(), self.errors.read_text()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, *told)


@contextmanager
def started_warm(
    arguments: list[str], *, cwd: Path | None, environment: dict[str, str], prepare: Callable[[], None] | None = None
) -> Iterator[WarmCommand]:
    """Starts `engram` with these arguments; it is killed at the end of the block, if it is still at work.

    `prepare` (picklable) is called first, in the launcher's process: its ranks have what that changes in modules.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "stdout"), Path(folder, "stderr")
        process = warm_process(_command, arguments, cwd or Path.cwd(), output, errors, prepare, **environment)
        process.start()
        try:
            yield WarmCommand(arguments, process, output, errors)
        finally:
            process.kill()
            process.join()


def _command(arguments: list[str], cwd: Path, output: Path, errors: Path, prepare: Callable[[], None] | None) -> None:
    import launch.local.process
    from launch.cli import main
    from launch.local.signals import told_in_one_line

    if prepare:
        prepare()
    os.chdir(cwd)
    for file, number in ((output, 1), (errors, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    launch.local.process.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=_Forked, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    os.execve = _become_rank  # type: ignore[assignment]
    with told_in_one_line():
        main(arguments, prog_name="engram")


class _Forked:
    """What the launcher uses of `subprocess.Popen`, for a rank that is forked from the launcher."""

    def __init__(
        self,
        command: list[str],
        *,
        env: dict[str, str],
        stdin: int,
        stdout: IO[bytes] | None,
        stderr: int | None,
        start_new_session: bool,
        preexec_fn: Callable[[], None] | None,
    ) -> None:
        assert command[:3] == [sys.executable, "-P", "-m"]
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT if stdout else None)
        assert start_new_session
        sys.stdout.flush()
        sys.stderr.flush()
        self.stdin = None  # nothing, as of every rank of these tests
        self.pid = os.fork()
        if self.pid == 0:
            _start_rank(command, environment=env, output=stdout, preexec=preexec_fn)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def _start_rank(
    command: list[str], *, environment: dict[str, str], output: IO[bytes] | None, preexec: Callable[[], None] | None
) -> NoReturn:
    try:
        os.setsid()
        if preexec:
            preexec()
        if output:
            os.dup2(output.fileno(), 1)
            os.dup2(1, 2)
        _become_rank(command[0], command, environment)
    finally:
        os._exit(1)


def _become_rank(path: str, command: list[str], environment: dict[str, str]) -> NoReturn:
    """What `os.execve` does with a rank's command line."""
    try:
        assert command[:3] == [path, "-P", "-m"]
        module, *arguments = command[3:]
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [module, *arguments]
        # runpy warns of a module that is imported already.
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__")
    finally:
        os._exit(1)
