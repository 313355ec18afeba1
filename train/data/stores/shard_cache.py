"""A folder of files that are fetched from elsewhere, of bounded size, shared by all processes of a machine.

Files appear whole or not at all. A lock guards every write, every eviction, and the count of bytes, which lies in a
file: it is taken anew from the folder when the cache is opened and whenever room is made, and in between is never less
than what is there. Readers take no lock: a file that is mapped stays readable when its name is removed.
"""

import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.errors import UserError

SHARD = ".shard"
"""Ending of the files that may be evicted."""
_LOCK, _USED, _INCOMING = ".lock", ".used", ".incoming"
COUNT_BYTES = 20
"""Of the limit, for the count."""
_SLACK = 16
"""At least this part of the limit is freed at once: listing the folder costs more than removing a file."""


class View(NamedTuple):
    """A file that is in the cache."""

    content: np.ndarray
    """uint8, mapped."""
    identity: tuple[int, int]
    """Differs from that of any other file that had its name."""


class _File(NamedTuple):
    used_ns: int
    size: int
    path: Path


class ShardCache:
    """Files by name (`folder/file`), at most `limit` bytes in all; shards that were not used for longest go first.

    Any number of threads and processes of one machine may use one folder, and be killed at any moment.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """Args: the folder, made if need be; the most bytes in it.

        Raises:
            OSError: it cannot be made or listed.
        """
        self.folder, self.limit = folder, limit
        self._room = limit - COUNT_BYTES
        folder.mkdir(parents=True, exist_ok=True)
        with self.alone(_LOCK):
            self._make_room(0)

    def view(self, name: str) -> View | None:
        """A file, now the one that was used last; None if it is not there."""
        path = self.folder / name
        try:
            with path.open("rb") as stream:
                found = os.fstat(stream.fileno())
                content = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            # Nothing else sets access times here; the modification time tells files of one name apart.
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
        except (FileNotFoundError, ValueError):  # ValueError: it is empty
            return None
        return View(content, (found.st_ino, found.st_mtime_ns))

    def keep(self, name: str, content: bytes) -> bool:
        """Adds a shard, unless no room can be made for it; returns whether it is there now."""
        path, incoming = self.folder / name, self.folder / _INCOMING
        with self.alone(_LOCK):
            if path.exists():
                return True
            if not self._make_room(len(content)):
                return False
            try:
                path.parent.mkdir(exist_ok=True)
                incoming.write_bytes(content)
                incoming.replace(path)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                incoming.unlink(missing_ok=True)
                return False
        return True

    def drop(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def claim(self, name: str, size: int) -> Path:
        """An empty file of a size, which counts from now on and is not evicted; what had its name is overwritten.

        Raises:
            UserError: there is no room for it.
            OSError: it cannot be made.
        """
        path = self.folder / name
        with self.alone(_LOCK):
            path.unlink(missing_ok=True)
            if not self._make_room(size):
                raise UserError(
                    f"data.cache_bytes: in {self.limit:,} bytes there is no room for {path} ({size:,}); raise it, or "
                    f"remove folders in {self.folder} of stores that are no longer read"
                )
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as stream:
                stream.truncate(size)
        return path

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Lets one thread of all processes at a time into a block of one name."""
        # The system's lock of an open file: it is held by this thread alone, and a killed process gives it back.
        lock = os.open(self.folder / name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _make_room(self, size: int) -> bool:
        """Counts `size` more bytes, if they fit once shards are evicted."""
        counter = self.folder / _USED
        try:
            used = int(counter.read_text())
        except (FileNotFoundError, ValueError):
            used = self._room
        if not size or used + size > self._room:
            files = sorted(self._files())
            used = sum(file.size for file in files)
            if used + size > self._room:
                wanted = self._room - max(size, self._room // _SLACK)
                for file in files:
                    if used > wanted and file.path.suffix == SHARD:
                        file.path.unlink(missing_ok=True)
                        used -= file.size
        fits = used + size <= self._room
        counter.write_text(str(used + size if fits else used))
        return fits

    def _files(self) -> Iterator[_File]:
        for path in self.folder.rglob("*"):
            try:
                found = path.stat()
            except FileNotFoundError:  # dropped meanwhile
                continue
            if path.is_file() and path.name != _USED:
                yield _File(found.st_atime_ns, found.st_size, path)
