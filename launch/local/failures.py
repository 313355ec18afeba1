"""How a failure is reported: to the user in one line if it is theirs, from a rank to its launcher in a small file."""

import errno
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from train.errors import Interrupted, UserError
from train.files import new_file

REPORT_FILE = "ENGRAM_RANK_REPORT"
"""Environment variable in which the launcher tells a rank where to write its `RankReport`."""

TORCHRUN_REPORT_FILE = "TORCHELASTIC_ERROR_FILE"
"""Environment variable in which torchrun tells a rank where to leave its error, for torchrun to show at its end."""
EXIT_CODE_FILE = "ENGRAM_EXIT_CODE"
"""Environment variable that names a file for the exit code of the first rank of this machine that fails, for scripts
around torchrun, which ends with 1 whatever its ranks end with."""

USER_ERROR_EXIT = 2
"""Exit code for a user's mistake; every other failure is 1."""

_PEER_ERRORS = {"ConnectionError", "DistNetworkError", "DistBackendError", "DistStoreError"}
_TOLD_WHOLE = {"VerifyError", "Hung"}  # named, not imported: the launcher must start without loading torch
_PEER_LATER_S = 3600
_PEER_MESSAGE = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|timed out waiting \d+ ?ms", re.IGNORECASE
)


_ADVICE = {
    (errno.ENOSPC, errno.EDQUOT): "make room, then run it again",
    (errno.EACCES, errno.EPERM, errno.EROFS): "allow it, or choose another folder",
    (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP): "check the path",
    (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY): "move it away, or choose another path",
    (errno.EBUSY, errno.EXDEV, errno.ETXTBSY): "something is mounted or at work there: choose another path",
    (errno.EIO, errno.ESTALE, errno.ENXIO): "the disk or network share fails: check it, then run it again",
    (errno.EMFILE, errno.ENFILE): "raise the limit of open files (ulimit -n), then run it again",
}


class RankFailed(RuntimeError):
    """A rank crashed; the message says which, and shows its traceback or the end of its log."""


def user_message(error: BaseException) -> str | None:
    """The one line to show for `error` if the user can fix it, else None."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if not isinstance(error, OSError):
        return None
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.errno is None or not (error.filename or full):
        return None
    # The program has no paths of its own: what it opens is the user's, or lies where the user said.
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    advice = next((advice for kinds, advice in _ADVICE.items() if error.errno in kinds), "check it, then run it again")
    return f"{place}{(error.strerror or os.strerror(error.errno)).lower()}; {advice}"


@dataclass(frozen=True)
class RankReport:
    """Why a rank ended before the run did.

    `peer`: it only lost the connection to another one, whose failure is the real one. `interrupted`: a signal ended the
    run, which is not a failure.
    """

    kind: Literal["user", "crash", "peer", "interrupted"]
    text: str
    time: float

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """The report on an exception that is being handled."""
        message = user_message(error)
        if message is not None:
            return cls("user", message, time.time())
        if isinstance(error, Interrupted):
            return cls("interrupted", str(error), time.time())
        if type(error).__name__ in _TOLD_WHOLE:
            return cls("crash", str(error), time.time())
        return cls("peer" if _lost_peer(error) else "crash", traceback.format_exc().rstrip(), time.time())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Puts the report at `path`, whole or not at all."""
        with new_file(Path(path)) as partial:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def write_for_torchrun(self, path: str | os.PathLike[str]) -> None:
        """Puts the report at `path` in the form of `torch.distributed.elastic`'s error files."""
        # torchrun blames the oldest report, in whole seconds: one that only lost a peer must not be it.
        told_at = int(self.time) + (_PEER_LATER_S if self.kind == "peer" else 0)
        info = {"py_callstack": self.text, "timestamp": str(told_at)}
        Path(path).write_text(json.dumps({"message": {"message": self.text, "extraInfo": info}}), encoding="utf-8")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self | None:
        """The report at `path`; None if there is none."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def _lost_peer(error: BaseException) -> bool:
    if {base.__name__ for base in type(error).__mro__} & _PEER_ERRORS or _PEER_MESSAGE.search(str(error)):
        return True
    return error.__cause__ is not None and _lost_peer(error.__cause__)


def leave_exit_code(code: int) -> None:
    """Leaves a failed rank's exit code for the script that asked for it, unless another rank has left one."""
    if code and (path := os.environ.get(EXIT_CODE_FILE)):
        with suppress(FileExistsError), Path(path).open("x") as file:
            file.write(str(code))


def reported(body: Callable[[], None]) -> int:
    """Runs a rank's `body` and returns its exit code; a failure is reported to the launcher, or else to stderr.

    Rank 0 writes to the user's terminal, where the launcher will show the failure: it does not print it itself.
    """
    try:
        body()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        return _report(error)
    return 0


def leave(error: BaseException) -> None:
    """Ends a rank's process with a failure, from any thread, whatever its other threads are doing."""
    code = _report(error)
    leave_exit_code(code)
    os._exit(code)


def _report(error: BaseException) -> int:
    """Reports how a rank ended, to the launcher or else to stderr; returns its exit code."""
    report = RankReport.of(error)
    path = os.environ.get(REPORT_FILE)
    if path:
        report.write(path)
    if isinstance(error, Interrupted):
        return error.code  # the run has reported it
    if not path and (path := os.environ.get(TORCHRUN_REPORT_FILE)):
        report.write_for_torchrun(path)
    if not path or os.environ.get("RANK", "0") != "0":
        print(f"Error: {report.text}" if report.kind == "user" else report.text, file=sys.stderr, flush=True)
    return USER_ERROR_EXIT if report.kind == "user" else 1
