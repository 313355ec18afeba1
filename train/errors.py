"""What ends a command for a reason that is no bug, and how it is told in one line."""

import errno
import os

_ADVICE = {
    (errno.ENOSPC, errno.EDQUOT): "make room, then run it again",
    (errno.EACCES, errno.EPERM, errno.EROFS): "allow it, or choose another folder",
    (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP): "check the path",
    (errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY): "move it away, or choose another path",
    (errno.EBUSY, errno.EXDEV, errno.ETXTBSY): "something is mounted or at work there: choose another path",
    (errno.EIO, errno.ESTALE, errno.ENXIO): "the disk or network share fails: check it, then run it again",
    (errno.EMFILE, errno.ENFILE): "raise the limit of open files (ulimit -n), then run it again",
}


class UserError(ValueError):
    """A mistake in a config, a command or the input data, reported in one line without a traceback.

    The message says what is wrong, where (file, key) and what to do. The command line prints it and exits with 2.
    """


class Interrupted(BaseException):
    """A signal ended a run between two steps; the message says where it is saved, and `code` is the exit code."""

    def __init__(self, told: str, code: int) -> None:
        super().__init__(told)
        self.code = code


class Hung(RuntimeError):
    """No rank makes progress any more; the message names the one that the others wait for, its step and stage."""


def told_by_system(error: OSError) -> str | None:
    """A system's error in one line, with what to do, if it is about a path or a full disk; else None.

    The program has no paths of its own: what it opens is the user's, or lies where the user said.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if error.errno is None or not (error.filename or full):
        return None
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    advice = next((advice for kinds, advice in _ADVICE.items() if error.errno in kinds), "check it, then run it again")
    return f"{place}{(error.strerror or os.strerror(error.errno)).lower()}; {advice}"
