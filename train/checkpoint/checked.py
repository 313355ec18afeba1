"""Checksums, JSON files that carry their own, and what is raised where one does not match.

XXH3 (64 bits) detects what disks, controllers and copies do to bytes by chance; it is not a signature.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

_FIRST_LINE = re.compile(rb'\{"xxh3_64": "([0-9a-f]{16})",\n')


class Damaged(Exception):
    """A file of a checkpoint is missing, cut short, or not what was saved."""


def checksum(data: bytes | memoryview) -> str:
    """XXH3 of some bytes, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(data)


class Checksum:
    """`checksum` of bytes that come one after another."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def add(self, data: memoryview) -> None:
        """The next bytes."""
        self._state.update(data)

    def text(self) -> str:
        """Of all that were added."""
        return self._state.hexdigest()


def checked_text(values: dict[str, Any]) -> tuple[bytes, str]:
    """A JSON object as a file whose first line is the checksum of all the others; the file, and the checksum."""
    rest = json.dumps(values, indent=1, ensure_ascii=False).encode()[2:] + b"\n"
    found = checksum(rest)
    return b'{"xxh3_64": "%s",\n%s' % (found.encode(), rest), found


def read_checked(path: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> tuple[dict[str, Any], str]:
    """Reads what `checked_text` made: the object, and its checksum.

    Args:
        path: of the file.
        read: gives its bytes.

    Raises:
        Damaged: the file cannot be read, or any byte of it differs.
    """
    with reading(path):
        data = read(path)
    first = _FIRST_LINE.match(data)
    if first is None or checksum(memoryview(data)[first.end() :]) != first[1].decode():
        raise Damaged(f"{path.name} is not what was saved (its checksum differs)")
    values: dict[str, Any] = json.loads(data)
    del values["xxh3_64"]
    return values, first[1].decode()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns the system's errors on reading `path` into `Damaged`."""
    try:
        yield
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror or error})") from None
