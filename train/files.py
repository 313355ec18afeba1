"""Files and folders that appear whole or not at all."""

import os
import shutil
from pathlib import Path


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
