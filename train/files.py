"""Files and folders that appear whole or not at all, and the locks that keep a folder to one process."""

import contextlib
import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from train.errors import UserError


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Gives the name of a file to write, with the same ending; when the block ends well, it becomes `target`."""
    partial = target.with_name(f".partial-{os.getpid()}.{target.name}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder to fill; when the block ends well, its files are synced and it becomes `target`.

    After an error, an interrupt or a kill, `target` is as before. What a killed process left behind is removed by the
    next one that builds the same target. Of two processes building at once the first to end wins. If `target` is a
    link, the folder that it leads to is meant.

    Raises:
        UserError: `target` is there and not empty (unless `overwrite`), is a mount point, or its parent cannot be
            written.
    """
    target = target.resolve()
    _refuse_used(target, overwrite)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            partial = stack.enter_context(_locked_folder(target))
        except OSError as error:
            raise UserError(f"{target}: cannot be made ({error.strerror})") from None
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        _refuse_used(target, overwrite)
        put_in_place(partial, target, overwrite=overwrite)


def put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Renames a finished folder, all of it on the disk, to its name, if need be in place of one that is there.

    Both renames are atomic: between them there is no target, never half of one.
    """
    replaced = partial.with_name(f"{partial.name}-replaced")
    if overwrite and target.is_dir():
        target.replace(replaced)
    partial.replace(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the lock file `path` (made if absent) against other processes; a dead process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> TextIO | None:
    """Holds the lock file `path` (made if absent) as long as the returned file is open; None if another process does.

    A dead process holds nothing.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _refuse_used(target: Path, overwrite: bool) -> None:
    if os.path.ismount(target):
        raise UserError(f"{target}: is a mount point, which a finished folder cannot replace; give a folder within it")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(f"{target}: there is something in it already; choose another folder, or remove it")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, not a folder")


@contextlib.contextmanager
def _locked_folder(target: Path) -> Iterator[Path]:
    path, handle = _make_locked(target)
    try:
        yield path
    finally:
        os.close(handle)
        shutil.rmtree(path, ignore_errors=True)


def _make_locked(target: Path) -> tuple[Path, int]:
    while True:
        path = target.with_name(f"{_partial_prefix(target)}{uuid.uuid4().hex}")
        path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue
        if path.exists():
            return path, handle
        # Another process took it for abandoned between its making and its locking.
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(_partial_prefix(target))}*"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its process lives
        finally:
            os.close(handle)


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"
