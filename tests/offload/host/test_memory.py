"""What the system really gives: sizes, flags and pages as it lists them, disks that are too small."""

import mmap
import os
import shutil
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.host.memory import map_anonymous, map_file, touch
from tests.offload.host.pages import pages

MIB = 1 << 20
needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system lists no mappings")


def listed(words: torch.Tensor) -> tuple[int, set[str]]:
    """The size and the flags of a tensor's mapping, as the kernel lists them."""
    size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            first, last = (int(bound, 16) for bound in name.split("-"))
            size = last - first if first <= words.data_ptr() < last else 0
        elif size and name == "VmFlags:":
            return size, set(rest)
    raise AssertionError("the kernel does not list the mapping")


def as_words(memory: mmap.mmap) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.float32)


@needs_smaps
def test_anonymous_memory_has_the_size_asked_for_and_is_hidden_from_children() -> None:
    words = as_words(map_anonymous(5 * MIB + 12))
    assert words.nbytes == 5 * MIB + 12
    size, flags = listed(words)
    assert size == 5 * MIB + mmap.PAGESIZE
    assert "dc" in flags, "a forked child would get a copy"
    assert "sh" not in flags
    assert pages(words).resident == 0


@needs_smaps
def test_a_file_has_the_size_asked_for_its_blocks_and_no_name(tmp_path: Path) -> None:
    words = as_words(map_file(5 * MIB + 12, str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    size, flags = listed(words)
    assert size == 5 * MIB + mmap.PAGESIZE
    assert {"sh", "dc", "rr"} <= flags
    open_files = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()]
    mine = [fd for fd in open_files if str(fd.readlink()).startswith(f"{tmp_path}/")]
    assert [fd.stat().st_size for fd in mine] == [5 * MIB + 12]
    assert mine[0].stat().st_blocks * 512 >= 5 * MIB, "blocks that are not reserved may be missing later"
    assert int(words.count_nonzero()) == 0


@needs_smaps
def test_touching_allocates_every_page_and_changes_nothing() -> None:
    words = as_words(map_anonymous(130 * MIB + 12))  # chunks, the last of them uneven
    words[12345] = 7.0
    touch(words, threads=3)
    assert pages(words).resident >= words.nbytes
    assert words[12345] == 7.0
    assert int(words.count_nonzero()) == 1


@needs_smaps
def test_touching_works_on_systems_that_do_not_know_the_advice() -> None:
    words = as_words(map_anonymous(3 * MIB + 12))
    asked = []
    touch(words, 1, madvise=lambda *arguments: asked.append(arguments) or -1)
    assert len(asked) == 1
    assert pages(words).resident >= words.nbytes


def test_pages_are_counted_of_the_tensors_mapping_only(tmp_path: Path) -> None:
    words = torch.zeros(1024)
    start = words.data_ptr()
    listing = "".join(
        f"{first:x}-{first + 4096:x} rw-p 00000000 00:00 0 [heap]\nRss: {rss} kB\nAnonHugePages: {huge} kB\n"
        for first, rss, huge in ((start - 4096, 100, 100), (start, 4, 1), (start + 4096, 200, 200))
    )
    (tmp_path / "smaps").write_text(listing)
    counted = pages(words, tmp_path / "smaps")
    assert (counted.resident, counted.huge) == (4096, 1024)
    assert pages(words, tmp_path / "none").resident == 0


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_what_is_no_folder_is_refused_in_one_line(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=rf"^offload.host_file: cannot keep 1.00 MiB in {tmp_path / name} \({reason}\)"
    ):
        map_file(MIB, str(tmp_path / name))


def test_a_disk_without_room_is_refused_before_anything_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(8 * MIB, 5 * MIB, 3 * MIB))
    monkeypatch.setattr(os, "posix_fallocate", lambda *arguments: pytest.fail("blocks were taken"))
    with pytest.raises(ValueError, match=rf"takes 4.00 MiB, but the disk of {tmp_path} leaves 3.00 MiB: name a folder"):
        map_file(4 * MIB, str(tmp_path))


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
    first = map_file(5 * MIB, str(small_disk))
    with pytest.raises(ValueError, match=r"takes 5.00 MiB, but the disk of .* leaves 3.00 MiB"):
        map_file(5 * MIB, str(small_disk))
    first.close()
    map_file(5 * MIB, str(small_disk)).close()
    assert shutil.disk_usage(small_disk).free == 8 * MIB


def test_a_disk_that_another_rank_fills_first_is_refused_and_left_as_it_was(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = map_file(5 * MIB, str(small_disk))
    usage = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=8 * MIB))
    with pytest.raises(ValueError, match="No space left on device"):
        map_file(5 * MIB, str(small_disk))
    monkeypatch.undo()
    assert shutil.disk_usage(small_disk).free == usage.free
    first.close()
