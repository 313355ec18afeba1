"""What a disk does without us: files written by `dd`, files read by `cat`, and forgotten by the page cache."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from offload.host.limits import size_text
from train.errors import UserError


def require(folder: Path, nbytes: int) -> None:
    """Raises UserError if `dd` or `cat` is not there, or the disk of a folder has not so much room."""
    for program in ("dd", "cat"):
        if shutil.which(program) is None:
            raise UserError(f"part checkpoint compares with {program}, which is not in PATH: install GNU coreutils")
    if (free := shutil.disk_usage(folder).free) < nbytes:
        raise UserError(
            f"part checkpoint writes {size_text(nbytes)} into {folder}, {size_text(free)} are free: choose another "
            "--folder or a smaller --table-mib"
        )


def written_by_dd(file: Path, nbytes: int, block_bytes: int) -> float:
    """Seconds in which `dd` writes so many bytes in such blocks, rounded up, and syncs them. The file is removed."""
    blocks = -(-nbytes // block_bytes)
    command = ["dd", "if=/dev/zero", f"of={file}", f"bs={block_bytes}", f"count={blocks}", "conv=fsync"]
    try:
        return _timed(command)
    finally:
        file.unlink(missing_ok=True)


def read_by_cat(files: Iterable[Path]) -> float:
    """Seconds in which `cat` reads files."""
    return _timed(["cat", *map(str, files)])


def forget(files: Iterable[Path]) -> None:
    """Drops files from the page cache, which has nothing of them that is not on the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def settle() -> None:
    """Waits until the disk has all that was written before."""
    os.sync()


def _timed(command: list[str]) -> float:
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip().splitlines()[-1]}")
    return time.perf_counter() - started
