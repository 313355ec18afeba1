"""A shard in memory or in a file: the same bits, and nothing left behind."""

import contextlib
import mmap
import re
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from offload.config import LinkConfig, OffloadConfig
from offload.host.table import FileTable, HostTable
from tests.distributed import run_ranks
from tests.offload.host.pages import pages
from tests.offload.host.test_memory import MIB, needs_smaps
from tests.offload.tables_job import Job, Outcome, open_tables, run_jobs, train_step
from tests.warm import warm_context, warm_process

JOB = Job(skipped=(3,), evaluate=True)
TINY = 64


def variants(folder: Path) -> list[tuple[Job, OffloadConfig]]:
    """The same job with its shard in memory, and in a file at several depths."""
    settings: list[dict] = [{"depth": 0}, {"depth": 1, "host_touch": True}]
    settings += [{"depth": depth, "host_file": str(folder)} for depth in (0, 2)]
    settings.append(settings[-1] | {"emulate_link": LinkConfig(bytes_per_second=5e6, latency_s=0.001)})
    return [(JOB, OffloadConfig(window_rows=TINY, **setting)) for setting in settings]


def check_same_bits(outcomes: list[Outcome]) -> None:
    assert len({outcome.digest for outcome in outcomes}) == 1
    assert all(outcome.written_back > 0 for outcome in outcomes), (
        "no row went to the host: the test would prove nothing"
    )


def test_a_shard_in_a_file_gives_the_bits_of_one_in_memory(tmp_path: Path) -> None:
    check_same_bits(run_jobs(variants(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_may_share_a_folder(tmp_path: Path) -> None:
    in_memory, *_, in_files, _ = variants(tmp_path)
    for outcomes in run_ranks(run_jobs, 2, [in_memory, in_files]):
        check_same_bits(outcomes)


@needs_smaps
def test_memory_is_taken_when_it_is_written_or_at_once_in_huge_pages() -> None:
    table = HostTable(65536, 64)
    table.records_RW[100] = 1.0
    assert 0 < pages(table.records_RW).resident <= 8192
    touched = HostTable(65536, 64, touch_pages=True)
    given = pages(touched.records_RW)
    assert given.resident >= touched.nbytes == 16 * MIB
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if modes.exists() and "[never]" not in modes.read_text():
        assert given.huge > 0


def test_padding_is_memory_that_records_do_not_show() -> None:
    table = HostTable(1000, 5, stride=8)
    assert (table.records_RW.shape, table.records_RW.stride()) == ((1000, 5), (8, 1))
    assert table.records_RW.data_ptr() % mmap.PAGESIZE == 0, "no record would start a line"
    assert table.nbytes == 1000 * 8 * 4
    table.close()
    assert table.records_RW.shape == (0, 5)


def test_padding_takes_memory_that_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=30_000))
    HostTable(1000, 5).close()
    with pytest.raises(ValueError, match=r"takes 31.25 KiB of host memory, but the machine leaves 29.30 KiB"):
        HostTable(1000, 5, stride=8)


def test_an_empty_shard_is_a_table_too(tmp_path: Path) -> None:
    for table in (HostTable(0, 5, touch_pages=True), FileTable(0, 5, str(tmp_path))):
        assert tuple(table.records_RW.shape) == (0, 5)
        assert table.records_RW.nbytes == 0
        table.close()


def test_closing_gives_everything_back_after_its_last_user() -> None:
    table = HostTable(100_000, 64)
    row = table.records_RW[7]
    address = row.data_ptr()
    table.close()
    row += 1.0  # must not be a crash
    assert table.records_RW.shape == (0, 64)
    table.close()
    del row
    assert not any(first <= address < last for first, last in mappings())


def test_closing_gives_the_file_back(tmp_path: Path) -> None:
    table = FileTable(100_000, 64, str(tmp_path))
    table.records_RW[torch.tensor([7])] = torch.ones(1, 64)
    assert any(str(tmp_path) in name for name in open_files("self"))
    table.close()
    table.close()
    assert not any(str(tmp_path) in name for name in open_files("self"))


def open_files(process: int | str) -> list[str]:
    found = []
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return found


def mappings() -> list[tuple[int, int]]:
    bounds = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return [(int(first, 16), int(last, 16)) for first, last in bounds]


def test_the_shards_of_all_ranks_of_the_machine_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=30_000))
    open_tables(Job(), OffloadConfig()).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"^the table shards of this machine's 4 ranks take 47.52 KiB of host memory, but the machine leaves 29.30 KiB: lower model.engram.rows_per_head"):  # fmt: skip # noqa: E501
        open_tables(Job(), OffloadConfig())


def test_a_file_needs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    FileTable(1000, 10, str(tmp_path)).close()


def train_and_wait(folder: str, trained: Connection) -> None:
    tables = open_tables(Job(), OffloadConfig(window_rows=64, host_file=folder))
    for step in range(4):
        train_step(tables, Job(), step)
    trained.send("trained")
    time.sleep(60)


def test_a_killed_run_leaves_no_file(tmp_path: Path) -> None:
    receiver, sender = warm_context().Pipe(duplex=False)
    process = warm_process(train_and_wait, str(tmp_path), sender)
    process.start()
    try:
        assert receiver.poll(60)
        assert receiver.recv() == "trained"
        if Path("/proc").exists():
            found = " ".join(open_files(process.pid))
            assert re.search(rf"{tmp_path}/\S* \(deleted\)", found), "the shard is not in the folder"
    finally:
        process.kill()
        process.join(timeout=10)
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"mode": "resident"}, {"host_touch": True}])
def test_a_file_beside_what_excludes_it_is_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="has no meaning with"):
        OffloadConfig(host_file="/tmp", **settings)
