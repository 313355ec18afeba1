"""A file without a name on a local disk, with its whole size reserved."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from offload.errors import Unavailable
from offload.host.limits import size_text


def open_unnamed(folder: str) -> int:
    """The descriptor of an empty file that is gone with its last user, however that ends.

    Raises:
        Unavailable: the folder is not one, or cannot be written to.
    """
    with _told(folder, "a file"), tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return os.dup(file.fileno())


def reserve(file: int, nbytes: int, folder: str) -> None:
    """Gives the file its size, all zeros, and the blocks for it: a disk that is full later would end the run.

    Raises:
        Unavailable: the disk has too little space.
    """
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise Unavailable(
            f"offload.host_file: this rank's shard of the tables takes {size_text(nbytes)}, but the disk of "
            f"{folder} leaves {size_text(free)}: name a folder on a larger disk or use more machines"
        )
    with _told(folder, size_text(nbytes)):
        os.ftruncate(file, nbytes)
        os.posix_fallocate(file, 0, nbytes)


@contextmanager
def _told(folder: str, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(
            f"offload.host_file: cannot keep {what} in {folder} ({error.strerror}): "
            "name a folder on a local disk that this user can write to"
        ) from None
