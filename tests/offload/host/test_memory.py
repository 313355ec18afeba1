"""What the system really gives: sizes, flags and pages as it lists them."""

import mmap
from pathlib import Path
from unittest import mock

import pytest
import torch

from offload.errors import Unavailable
from offload.host.memory import map_anonymous, touch, zeros_on
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


def test_a_device_without_room_is_told_in_one_line() -> None:
    with (
        mock.patch.object(torch, "zeros", side_effect=torch.OutOfMemoryError("CUDA out of memory.\nTried ...")),
        pytest.raises(
            Unavailable, match=r"^cuda:1 has no 1\.46 GiB left for .* 2,000,000 rows: lower offload\.window_rows"
        ),
    ):
        zeros_on(torch.device("cuda", 1), 2_000_000, 196)
