"""Files with their whole size reserved, on disks that are large enough and on others."""

import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.host.disk_space import open_unnamed, reserve
from tests.offload.host.test_memory import MIB


def reserved(nbytes: int, folder: str) -> int:
    """The descriptor of a file of that size."""
    file = open_unnamed(folder)
    try:
        reserve(file, nbytes, folder)
    except ValueError:
        os.close(file)
        raise
    return file


def test_a_file_has_the_size_asked_for_its_blocks_and_no_name(tmp_path: Path) -> None:
    file = reserved(5 * MIB + 12, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    status = os.fstat(file)
    assert status.st_size == 5 * MIB + 12
    assert status.st_blocks * 512 >= 5 * MIB, "blocks that are not reserved may be missing later"
    assert os.pread(file, MIB, 3 * MIB) == bytes(MIB)
    os.close(file)


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_what_is_no_folder_is_refused_in_one_line(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=rf"^offload.host_file: cannot keep a file in {tmp_path / name} \({reason}\)"):
        reserved(MIB, str(tmp_path / name))


def test_a_disk_without_room_is_refused_before_anything_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(8 * MIB, 5 * MIB, 3 * MIB))
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: pytest.fail("blocks were taken"))
    with pytest.raises(ValueError, match=rf"takes 4.00 MiB, but the disk of {tmp_path} leaves 3.00 MiB: name a folder"):
        reserved(4 * MIB, str(tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk], capture_output=True).returncode != 0:
        pytest.skip("no right to mount a file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_real_disk_holds_as_many_shards_as_fit(small_disk: Path) -> None:
    first = reserved(5 * MIB, str(small_disk))
    with pytest.raises(ValueError, match=r"takes 5.00 MiB, but the disk of .* leaves 3.00 MiB"):
        reserved(5 * MIB, str(small_disk))
    os.close(first)
    os.close(reserved(5 * MIB, str(small_disk)))
    assert shutil.disk_usage(small_disk).free == 8 * MIB


def test_a_disk_that_another_rank_fills_first_is_refused_and_left_as_it_was(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reserved(5 * MIB, str(small_disk))
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=8 * MIB))
    with pytest.raises(ValueError, match="No space left on device"):
        reserved(5 * MIB, str(small_disk))
    monkeypatch.undo()
    assert shutil.disk_usage(small_disk).free == usage.free
    os.close(first)
