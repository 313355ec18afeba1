"""Files written past the page cache have the bytes that they were given, on every file system."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint.direct import BLOCK_BYTES, write_all

SIZES = st.lists(st.sampled_from([0, 1, 511, 4096, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1]), max_size=5)


def written(folder: Path, sizes: Sequence[int]) -> bool:
    """Whether a file of such parts has their bytes."""
    parts = [os.urandom(size) for size in sizes]
    with (folder / "file").open("wb", buffering=0) as file:
        write_all(file.fileno(), [memoryview(part) for part in parts])
    return (folder / "file").read_bytes() == b"".join(parts)


@given(SIZES)
def test_on_a_disk_and_in_memory(tmp_path_factory: pytest.TempPathFactory, sizes: list[int]) -> None:
    with TemporaryDirectory(dir="/dev/shm") as in_memory:
        assert written(tmp_path_factory.getbasetemp(), sizes)
        assert written(Path(in_memory), sizes)


def test_where_only_the_first_write_goes_past_the_cache(tmp_path: Path) -> None:
    real, calls = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, data)

    with mock.patch.object(os, "write", write):
        assert written(tmp_path, [BLOCK_BYTES, 100, BLOCK_BYTES, 17])
    assert calls == [BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES, 117]


def test_a_disk_that_refuses_every_write_is_told(tmp_path: Path) -> None:
    refused = mock.Mock(side_effect=[OSError(errno.EINVAL, "Invalid argument")] * 2)
    with mock.patch.object(os, "write", refused), pytest.raises(OSError, match="Invalid argument"):
        written(tmp_path, [BLOCK_BYTES])


def test_a_full_disk_is_told() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        write_all(file.fileno(), [memoryview(bytes(10))])
