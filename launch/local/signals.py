"""Signals that ask this process to end: what they do at any moment, and the line and exit code that report them.

The exit code is 128 plus the signal's number, as a shell's would be: 130 for Ctrl-C.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, NoReturn

from train.watch.ending import ENDING

_IMPORT_SYSTEM = "<frozen importlib._bootstrap"


class Stopped(BaseException):
    """A signal asked this process to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """Surrounds a process's whole work, which a signal ends with one line on standard error.

    Where modules are being imported it ends the process there and then: an exception would be taken for a missing
    module, or be lost in a library's start. Elsewhere it raises `Stopped`, so that partial files are removed and
    children end; a second signal does not wait for that. What is ignored (as under nohup) stays ignored.
    """
    _handle(_stop)
    try:
        yield
    except Stopped as stopped:
        # Not by the interpreter's own end, which waits for threads.
        _leave(stopped.signum, None)
    finally:
        leave_to_system()  # everything is done


def leave_to_system() -> None:
    """Gives the signals their default action, which ends this process at once, even within a library's C code."""
    _handle(signal.SIG_DFL)


class Received(NamedTuple):
    """A signal, and when it came, in seconds of the monotonic clock."""

    signum: int
    at: float


@contextmanager
def collected() -> Iterator[list[Received]]:
    """Lists signals as they arrive, instead of what else they would do."""
    received: list[Received] = []
    before = _handle(lambda signum, frame: received.append(Received(signum, time.monotonic())))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_Handler = Callable[[int, FrameType | None], object] | signal.Handlers


def _handle(handler: _Handler) -> dict[int, _Handler | int | None]:
    """Sets the handler of all these signals that are not ignored; returns the previous ones."""
    heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _stop(signum: int, frame: FrameType | None) -> None:
    _handle(_leave)
    if _importing(frame):
        _leave(signum, frame)
    raise Stopped(signum)


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    # Not print: the signal may have come within a write to the same stream.
    os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False
