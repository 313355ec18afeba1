"""Files and folders that appear whole or not at all: built beside their place under a hidden name, then renamed."""

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

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
        UserError: `target` exists and is not empty (unless `overwrite`), is a mount point, or its parent cannot be
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
            raise UserError(f"{target}: cannot be created ({error.strerror})") from None
        yield partial
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        _refuse_used(target, overwrite)
        put_in_place(partial, target, overwrite=overwrite)


def put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    """Renames a finished folder, all of it on the disk, to its name, if need be in place of an existing one.

    Both renames are atomic: between them there is no target, never half of one.
    """
    replaced = partial.with_name(f"{partial.name}-replaced")
    if overwrite and target.is_dir():
        target.replace(replaced)
    partial.replace(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _refuse_used(target: Path, overwrite: bool) -> None:
    if os.path.ismount(target):
        raise UserError(f"{target}: is a mount point, which cannot be replaced; give a folder inside it")
    if target.is_dir() and not overwrite and any(target.iterdir()):
        raise UserError(f"{target}: is not empty; choose another folder, or remove it")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file, not a folder")


@contextlib.contextmanager
def _locked_folder(target: Path) -> Iterator[Path]:
    path = target.with_name(f"{_partial_prefix(target)}{uuid.uuid4().hex}")
    # Locked before it is there: to others, a folder that nobody has locked is abandoned.
    with _lock_of(path) as lock:
        try:
            path.mkdir()
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def _remove_abandoned(target: Path) -> None:
    for path in target.parent.glob(f"{glob.escape(_partial_prefix(target))}*"):
        # A lock that is held belongs to a process that is alive.
        with contextlib.suppress(Timeout):
            if path.is_dir():
                with _lock_of(path).acquire(timeout=0) as lock:
                    shutil.rmtree(path, ignore_errors=True)
                    Path(lock.lock_file).unlink(missing_ok=True)


def _lock_of(path: Path) -> FileLock:
    return FileLock(path.with_name(f"{path.name}.lock"))


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-"
