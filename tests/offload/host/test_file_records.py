"""Records in a file: what was written is read, in any order and by several threads, and the disk's errors are told."""

import errno
import fcntl
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import compiled_loops
from offload.host import file_records
from offload.host.file_records import FileRecords, file_stride

ROWS, WORDS = 3000, 241


@pytest.fixture(params=[True, False], ids=["compiled", "plain"])
def records(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileRecords]:
    if not request.param:
        monkeypatch.setattr(compiled_loops, "available", lambda: False)
    opened = FileRecords(ROWS, WORDS, str(tmp_path))
    yield opened
    opened.close()


def test_what_was_written_is_read(records: FileRecords) -> None:
    """Rows alone, and side by side: more than travel at once, and up to the last."""
    generator = torch.Generator().manual_seed(0)
    expected_RW = torch.zeros(ROWS, WORDS)
    window_CW = torch.randn(2000, WORDS, generator=generator)
    for rows in (torch.randperm(ROWS, generator=generator)[:500], torch.arange(ROWS - 300, ROWS).flip(0)):
        slots = torch.randperm(2000, generator=generator)[: len(rows)]
        expected_RW[rows] = window_CW[slots]
        records.write(window_CW, slots, rows)
    expected_RW[[5, 4, 9]] = torch.randn(3, WORDS, generator=generator)
    records[torch.tensor([5, 4, 9])] = expected_RW[[5, 4, 9]]
    assert torch.equal(records.index_select(0, torch.arange(ROWS)), expected_RW)
    rows, slots = (torch.randperm(size, generator=generator)[:700] for size in (ROWS, 2000))
    before_CW = window_CW.clone()
    records.fetch(rows, window_CW, slots)
    before_CW[slots] = expected_RW[rows]
    assert torch.equal(window_CW, before_CW), "a slot that was not named changed"
    versions = expected_RW.view(torch.int32)[:, -1]
    assert torch.equal(records.versions(7, ROWS), versions[7:])


def test_records_begin_a_sector_and_share_none(tmp_path: Path) -> None:
    assert [file_stride(words, 512) for words in (1, 128, 129, 241)] == [512, 512, 1024, 1024]
    assert file_stride(241, 4096) == 4096
    records = FileRecords(10, 129, str(tmp_path))
    assert records.nbytes % 10 == 0
    assert records.nbytes // 10 in (1024, 4096)
    assert os.fstat(records._file).st_size == records.nbytes
    records.close()


def test_rows_side_by_side_travel_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever order they are given to be written, and never more than a buffer holds."""
    pytest.importorskip("numba")
    stride = file_stride(WORDS, 512)
    monkeypatch.setattr(file_records, "_RUN_BYTES", 8 * stride)
    records = FileRecords(ROWS, WORDS, str(tmp_path))
    most = max(1, 8 * stride // (records.nbytes // ROWS))
    parts = file_records._PARTS * file_records.IN_FLIGHT
    shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    window_CW = torch.randn(ROWS, WORDS)
    before = calls()
    records.write(window_CW, torch.arange(ROWS), shuffled)
    between = calls()
    records.fetch(torch.arange(ROWS), torch.empty(ROWS, WORDS), torch.arange(ROWS))
    after = calls()
    for done in (between["syscw"] - before["syscw"], after["syscr"] - between["syscr"]):
        assert ROWS // most <= done <= ROWS // most + parts + 20  # what else this process does meanwhile
    assert torch.equal(records.index_select(0, shuffled), window_CW)
    records.close()


def calls() -> dict[str, int]:
    """What all threads of this process read and wrote, and by how many calls."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("the system does not count calls")
    return {name: int(value) for name, value in (line.split(": ") for line in counts.read_text().splitlines())}


def test_the_whole_file_is_written_at_the_start(tmp_path: Path) -> None:
    """Into blocks that were only reserved, file systems let one write in at a time."""
    before = calls()["wchar"]
    records = FileRecords(ROWS, WORDS, str(tmp_path))
    assert calls()["wchar"] - before >= records.nbytes
    records.close()


def test_reads_and_writes_are_under_way_at_a_time(records: FileRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each as a disk needs, and of both together."""
    together = threading.Barrier(2 * file_records.IN_FLIGHT)

    def move(*arguments: Any) -> int:
        together.wait(timeout=20)
        return 0

    monkeypatch.setattr(file_records, "_mover", lambda what: move)
    rows = torch.arange(ROWS)
    with ThreadPoolExecutor(1) as other:
        written = other.submit(records.write, torch.empty(ROWS, WORDS), rows, rows)
        records.fetch(rows, torch.empty(ROWS, WORDS), rows)
        written.result()


def test_the_systems_cache_keeps_nothing_of_it(records: FileRecords, tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system does not go past the cache")
    assert fcntl.fcntl(records._file, fcntl.F_GETFL) & os.O_DIRECT


@pytest.mark.parametrize("smallest", [512, 4096, None])
def test_the_smallest_sector_that_the_disk_takes_is_found(
    smallest: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it takes none, the system's cache is used after all."""
    read = os.preadv

    def reading(file: int, buffers: list[Any], offset: int) -> int:
        if smallest is None or len(buffers[0]) % smallest or offset % smallest:
            raise OSError(errno.EINVAL, "not a sector")
        return read(file, buffers, offset)

    monkeypatch.setattr(file_records.os, "preadv", reading)
    file = file_records.open_unnamed(str(tmp_path))
    try:
        assert file_records._sector_of(file) == (smallest or 512)
        if smallest is None:
            assert not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT
    finally:
        os.close(file)


def test_a_disk_that_fails_is_named_with_its_folder(records: FileRecords, tmp_path: Path) -> None:
    os.ftruncate(records._file, records.nbytes // 2)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] offload.host_file: reading the tables' file in {tmp_path} failed"):  # fmt: skip # noqa: E501
        records.index_select(0, torch.tensor([ROWS - 1]))
    assert torch.equal(records.index_select(0, torch.tensor([3])), torch.zeros(1, WORDS))
    only_read = os.open(f"/proc/self/fd/{records._file}", os.O_RDONLY)
    os.dup2(only_read, records._file)
    os.close(only_read)
    with pytest.raises(OSError, match=f"writing the tables' file in {tmp_path} failed"):
        records[torch.tensor([3])] = torch.ones(1, WORDS)


def test_a_file_system_in_memory_holds_records_too(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        records = FileRecords(ROWS, WORDS, str(tmp_path))
        records[torch.tensor([9])] = torch.ones(1, WORDS)
        assert torch.equal(records.index_select(0, torch.tensor([9])), torch.ones(1, WORDS))
        records.close()
        assert shutil.disk_usage(tmp_path).free == 8 << 20
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_no_rows(records: FileRecords) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    records.write(torch.zeros(1, WORDS), nothing, nothing)
    assert records.index_select(0, nothing).shape == (0, WORDS)
    assert file_records.IN_FLIGHT > 1
