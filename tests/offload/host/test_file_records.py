"""Records in a file: what was written is read, in any order and by several threads, and the disk's errors are told."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
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
        records.write(window_CW, slots, rows)
        expected_RW[rows] = window_CW[slots]
    records[torch.tensor([5, 4, 9])] = expected_RW[[5, 4, 9]] = torch.randn(3, WORDS, generator=generator)
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
    """Counted by a disk that ends in the middle of a run: all that was to be read with it is missing."""
    pytest.importorskip("numba")
    from offload.host.file_records_numba import _run

    rows = torch.tensor([3, 4, 5, 7, 8, 20]).numpy()
    assert [_run(rows, place, 6) for place in range(6)] == [3, 2, 1, 2, 1, 1]
    assert _run(rows, 0, 2) == 2


def test_a_disk_that_fails_is_named_with_its_folder(records: FileRecords, tmp_path: Path) -> None:
    os.ftruncate(records._file, records.nbytes // 2)
    with pytest.raises(OSError, match=rf"^\[Errno {errno.EIO}\] offload.host_file: reading the tables' file in {tmp_path} failed"):  # fmt: skip # noqa: E501
        records.index_select(0, torch.tensor([ROWS - 1]))
    assert torch.equal(records.index_select(0, torch.tensor([3])), torch.zeros(1, WORDS))


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
