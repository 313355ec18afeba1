"""`engram plan --calibrate`: numbers of this machine, of which another plan is made."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.calibrate import disk
from launch.calibrate.memory import kept_of
from launch.plan.hardware import read_catalogue
from offload.host import file_records
from tests.command_line import assert_refused, invoke
from train.errors import UserError

TINY = str(Path(__file__).parents[3] / "configs" / "tiny.yaml")


@pytest.mark.long
def test_this_machine_s_numbers_are_such_as_a_processor_has_and_plan_a_job(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    assert invoke("plan", "--calibrate", str(file)).exit_code == 0
    catalogue = read_catalogue(file)
    here = catalogue.gpu("here")
    assert 1e8 < here.device.flops_per_second < 1e13
    assert 1e8 < here.link.fetch_bytes_per_second < here.device.memory_bytes_per_second < 1e12
    for kept in (here.device.kept, here.device.kept_adding):
        assert 2**22 < kept.bytes + kept.share * 2**28 < 2**29
    assert 1e-7 < here.host.launch_seconds < 1e-2
    assert 0 < here.host.decide_seconds < 1e-4
    assert 0 < here.rows.read_seconds < 1e-4
    assert 100 < here.node.disk_records_per_second < 1e7
    assert 1e6 < catalogue.network("loopback").bytes_per_second < 1e12
    assert catalogue.gpu("h100").device.overlaps_launches
    told = invoke("plan", TINY, "--hardware", str(file), "--gpu", "here", "--gpus-per-node", "2")
    assert told.exit_code == 0, told.output
    assert "A GPU's memory, of 1 x 2 here" in told.stdout


def test_what_a_process_keeps_is_a_line_through_two_models_and_never_negative() -> None:
    assert kept_of([(100.0, 50.0), (300.0, 110.0)]) == {"bytes": pytest.approx(20), "share": pytest.approx(0.3)}
    assert kept_of([(100.0, 30.0), (300.0, 120.0)]) == {"bytes": 0.0, "share": pytest.approx(0.45)}
    assert kept_of([(100.0, 50.0), (300.0, 40.0)]) == {"bytes": 40.0, "share": 0.0}


def test_a_disk_s_rate_counts_what_it_reads_and_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[str, int]] = []

    def mover(what: str) -> Callable[..., int]:
        def move(*arguments: Any) -> int:
            time.sleep(0.01 if what == "writing" else 0.0)
            moved.append((what, arguments[-1] - arguments[-2]))
            return 0

        return move

    def half_a_second(work: Callable[[], object]) -> float:
        work()
        assert [sum(count for what, count in moved if what == way) for way in ("reading", "writing")] == [100, 100]
        return 0.5

    monkeypatch.setattr(file_records, "_mover", mover)
    monkeypatch.setattr(disk, "_MOVED", 100)
    monkeypatch.setattr(disk, "typical", half_a_second)
    assert disk.disk_rate(5, str(tmp_path), rows=400) == 2 * 100 / 0.5
    with pytest.raises(UserError, match=r"^--calibrate measures the disk that its file is on: .*nowhere"):
        disk.disk_rate(5, str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate", "no/where/here.yaml"), "--calibrate no/where/here.yaml: there is no folder no/where"),
        ((), "Missing argument 'CONFIG'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert_refused(invoke("plan", *arguments), message)
