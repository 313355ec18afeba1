"""Files and folders that appear whole or not at all, and the lock that keeps a folder to one process."""

import fcntl
import os
import shutil
from pathlib import Path
from typing import TextIO


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: Path, target: Path) -> None:
    """Renames a finished folder to its name, in place of one that may be there; at no time is there half of one."""
    for file in partial.iterdir():
        sync(file)
    sync(partial)
    replaced = partial.with_name(f"{partial.name}-replaced")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def try_lock(path: Path) -> TextIO | None:
    """Holds the lock file `path` (made if absent) as long as the returned file is open; None if another process does.

    A dead process holds nothing.
    """
    file = path.open("a", encoding="utf-8")  # not "w", which would empty another's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
