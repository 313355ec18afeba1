"""Files and folders that appear whole or not at all: built beside their place under a hidden name, then renamed."""

import contextlib
import ctypes
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from train.errors import UserError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, linux/fs.h


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_regular(path: Path) -> None:
    """Refuses pipes and devices, which may never end and cannot be read twice; a folder or nothing is left to others.

    Raises:
        UserError: it is one.
        OSError: the system cannot tell.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: a pipe or device, not a file; write what it gives into a file")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Gives the name of a file to write, with the same ending; when the block ends well, it becomes `target`.

    If `target` is a link, the file that it leads to is meant.
    """
    target = Path(os.path.realpath(target))
    partial = target.with_name(f".partial-{os.getpid()}.{target.name}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(
    target: Path,
    *,
    overwrite: bool = False,
    like: str | None = None,
    goes_on: Callable[[Path], bool] = lambda folder: False,
) -> Iterator[Path]:
    """Gives a temporary folder to fill; when the block ends well, its files are synced and it becomes `target`.

    After an error, an interrupt or a kill, `target` is as before. What a killed process left behind is removed by the
    next one that builds the same target, or given to it to go on with. Of two processes building at once the first to
    end wins. If `target` is a link, the folder that it leads to is meant.

    Args:
        target: the folder to make.
        overwrite: replace what is there.
        like: an entry without which what is there is not ours, and is not replaced.
        goes_on: whether an unfinished folder is worth being kept, and what this process wants to go on with.

    Raises:
        UserError: `target` is there and not empty (unless `overwrite`), not one of ours, a mount point, or its parent
            cannot be written.
    """
    target = Path(os.path.realpath(target))
    _refuse_used(target, overwrite, like)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(_locked_folder(target, goes_on))
        except OSError as error:
            raise UserError(f"{target}: cannot be created ({error.strerror})") from None
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        _refuse_used(target, overwrite, like)
        put_in_place(partial, target, overwrite=overwrite)


def put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Renames a finished folder, all of it on the disk, to its name, if need be in place of an existing one.

    The two change their names in one step. Where the file system cannot do that, there is no target between two
    renames, never half of one. Only where it cannot rename what is there, as a folder of a container's image, that is
    removed instead, once its successor is complete.
    """
    replaced = partial.with_name(f"{partial.name}-replaced")
    if overwrite and target.is_dir():
        if _exchange(partial, target):
            sync(target.parent)
            shutil.rmtree(partial, ignore_errors=True)
            return
        try:
            target.replace(replaced)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.rmtree(target)
    partial.replace(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where that is not possible: renameat2(2), of Linux, and not over NFS."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _refuse_used(target: Path, overwrite: bool, like: str | None) -> None:
    if target.is_symlink():
        raise UserError(f"{target}: is a link that leads in a circle; remove it, or choose another folder")
    if os.path.ismount(target):
        raise UserError(f"{target}: is a mount point, which cannot be replaced; give a folder inside it")
    used = target.is_dir() and any(target.iterdir())
    if used and not overwrite:
        raise UserError(f"{target}: is not empty; choose another folder, or remove it")
    if used and like and not (target / like).is_file():
        raise UserError(f"{target}: is not empty and has no {like}, so it is not replaced; choose another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, not a folder")


@contextlib.contextmanager
def _locked_folder(target: Path, goes_on: Callable[[Path], bool]) -> Iterator[Path]:
    new = target.with_name(f"{_partial_prefix(target)}{uuid.uuid4().hex}")
    with contextlib.ExitStack() as locks:
        path = next(filter(goes_on, _abandoned(target, locks)), new)
        if path is new:
            # Locked before it is there: to others, a folder that nobody has locked is abandoned.
            locks.enter_context(_lock_of(path))
            path.mkdir()
        try:
            yield path
        finally:
            if not goes_on(path):
                _remove(path)


def _abandoned(target: Path, locks: contextlib.ExitStack) -> Iterator[Path]:
    """What killed processes have left, locked; removed if the caller does not stop at it."""
    for path in target.parent.glob(f"{glob.escape(_partial_prefix(target))}*"):
        # A lock that is held belongs to a process that is alive.
        with contextlib.suppress(Timeout):
            if path.is_dir():
                locks.enter_context(_lock_of(path).acquire(timeout=0))
                yield path
                _remove(path)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _lock_name(folder).unlink(missing_ok=True)


def _lock_of(path: Path) -> FileLock:
    return lock_file(_lock_name(path))


def _lock_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def lock_file(path: Path) -> FileLock:
    """A lock on a file.

    Raises:
        OSError: it cannot be made; the lock itself would take that for somebody else's and wait for ever.
    """
    path.touch()
    return FileLock(path)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"
