import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

from launch.bench import scaling, worker
from launch.bench.data import recorded_step_s
from launch.bench.measure import Spread, Times, race, ratios, wait_until_idle
from launch.bench.options import BenchOptions
from launch.bench.parts import PARTS, Part
from launch.bench.path.part import measure_path
from launch.bench.planning import measure_planning
from launch.bench.report import Measure, Section
from launch.bench.scaling import measure_scaling
from launch.bench.stall.disk import measure_disk_stall
from launch.bench.workload import Workload
from tests.launch.missing import hide_fbgemm
from train.errors import UserError
from train.progress import Progress

OPTIONS = BenchOptions(workload=Workload(lookups=64, rows=80, dim=4), steps=2, warmup=1)


class Recorder:
    def __init__(self, name: str, taken: list[tuple[str, int]], work: Callable[[], None] = lambda: None) -> None:
        self.name, self._taken, self._work = name, taken, work

    def step(self, step: int) -> None:
        self._taken.append((self.name, step))
        self._work()

    def close(self) -> None:
        pass


def quiet() -> Progress:
    return Progress("", active=False)


def spin(seconds: float) -> None:
    """Works until this thread has had so much of a processor."""
    while time.thread_time() < seconds:
        pass


def test_contenders_take_turns_and_nobody_always_starts() -> None:
    taken: list[tuple[str, int]] = []
    times = race([Recorder(name, taken) for name in "abc"], steps=2, warmup=1, progress=quiet())
    assert taken == [(name, step) for step, names in enumerate(["abc", "bca", "cab"]) for name in names]
    assert [len(its.step_ms) for its in times] == [2, 2, 2]


def test_work_left_to_other_threads_is_not_the_next_ones_nor_lost() -> None:
    taken: list[tuple[str, int]] = []
    leaves_work = Recorder("a", taken, lambda: threading.Thread(target=spin, args=(0.06,)).start())
    times = race([leaves_work, Recorder("b", taken)], steps=2, warmup=1, progress=quiet())
    # Processor time, which a busy machine does not lengthen.
    assert min(times[0].cpu_ms) >= 60 > max(times[1].cpu_ms)
    assert min(times[0].background_ms) > 0


def test_waiting_for_idle_ends_when_nothing_works() -> None:
    assert wait_until_idle() < 5.0


def test_spread_and_ratios() -> None:
    assert Spread.of([float(number) for number in range(11)]) == Spread(5.0, 1.0, 9.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    drifting, base = Times(step_ms=[2.0, 20.0, 200.0]), Times(step_ms=[1.0, 10.0, 100.0])
    assert ratios(drifting, base) == Spread(2.0, 2.0, 2.0), "rounds are not compared with one another"


def test_a_section_survives_json_and_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"contender": "a[ids]", "step_ms": Spread(123.4, 12.0, 1234.0), "status": "measured"},
        {"contender": "b", "step_ms": None, "status": "not installed"},
    ]
    section = Section("Title", rows, [Measure("share", 0.5, 0.7), Measure("growth", 1.2, 1.1)], ["a note"])
    assert Section.from_json(section.to_json()) == section
    assert [measure["met"] for measure in section.to_json()["measures"]] == [True, False]
    section.show(Console(width=120))
    shown = capsys.readouterr().out
    for text in ("a[ids]", "123 (12.0 to 1,234)", "not installed", "a note", "met: share", "NOT MET: growth"):
        assert text in shown
    joined = section.joined(section)
    assert len(joined.rows) == 4
    assert joined.notes == ["a note"]


def test_path_names_what_is_missing_and_measures_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_fbgemm(monkeypatch)
    section = measure_path(OPTIONS, quiet())
    status = {str(row["contender"]): row["status"] for row in section.rows}
    missing = status.pop("FBGEMM on CPU, row-wise Adagrad")
    assert missing == "not installed: pip install engram-pretrain[bench]"
    assert set(status.values()) == {"measured"}
    ours = {f"engram, {name}, {mode}" for name in ("rowwise-adagrad", "adam") for mode in ("resident", "window")}
    assert status.keys() == ours | {"nn.Embedding(sparse=True), SparseAdam", "nn.Embedding, Adam", "gather alone, table[ids]"}  # fmt: skip # noqa: E501
    assert [measure.limit for measure in section.measures] == [0.2, 0.2], "a share of FBGEMM's step without FBGEMM"
    assert all(isinstance(row["step_ms"], Spread) for row in section.rows if row["status"] == "measured")


def test_path_leaves_out_what_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 3 * 80 * 4 * 4  # SparseAdam holds its table four times, Adam five times
    monkeypatch.setattr("launch.bench.path.part._free_memory", lambda device: limit)
    status = {str(row["contender"]): str(row["status"]) for row in measure_path(OPTIONS, quiet()).rows}
    assert sum("of memory" in its for its in status.values()) == 2
    assert status["engram, adam, window"] == "measured"


def test_the_least_bytes_of_a_step_count_each_thing_once() -> None:
    section = measure_path(replace(OPTIONS, optimizer="sgd"), quiet())
    least = {str(row["contender"]): row["least_mb"] for row in section.rows if row["status"] == "measured"}
    drawn = OPTIONS.draw()
    row, lookups = 4 * drawn.workload.dim, drawn.workload.lookups
    unique = sum(drawn.unique_counts[OPTIONS.warmup :]) / OPTIONS.steps
    assert least["gather alone, table[ids]"] == pytest.approx(1e-6 * row * (lookups + unique))
    trained = row * (2 * lookups + unique)
    assert least["engram, sgd, resident"] == pytest.approx(1e-6 * (trained + 2 * (row + 4) * unique))
    assert least["engram, adam, resident"] == pytest.approx(1e-6 * (trained + 2 * (3 * row + 4) * unique))


def test_disk_measures_every_look_ahead_against_the_time_of_its_reads(tmp_path: Path) -> None:
    workload = Workload(lookups=64, rows=400, dim=4, zipf=1.01)
    section = measure_disk_stall(replace(OPTIONS, workload=workload, window_rows=120, host_file=str(tmp_path)), quiet())
    assert [row["depth"] for row in section.rows] == [0, 0, 1, 2, 4]
    alone, *computing = section.rows
    assert alone["compute_ms"] == 0.0
    assert {row["compute_ms"] for row in computing} == {alone["stall_ms"].median}  # type: ignore[union-attr]
    assert all(row["fetched_mb"] > 0 for row in section.rows), "no row was read: the test would prove nothing"  # type: ignore[operator]
    assert [measure.limit for measure in section.measures] == [0.05]
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_records_has_no_step_to_compare_its_loader_with(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}: no step is recorded yet"):
        recorded_step_s(tmp_path)


def test_a_bug_in_a_part_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(options: BenchOptions, progress: Progress) -> Section:
        raise ValueError("negative dimensions are not allowed")

    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(PARTS, "path", Part(broken))
    options = json.dumps(replace(OPTIONS, threads=torch.get_num_threads()).to_json())
    with pytest.raises(ValueError, match="negative") as found:
        worker.measure("path", options, str(tmp_path / "result"))
    assert not isinstance(found.value, UserError)


def test_scaling_measures_both_kinds_of_larger_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.Mock(wraps=scaling.TablePath)
    monkeypatch.setattr(scaling, "TablePath", made)
    section = measure_scaling(OPTIONS, quiet())
    assert [row["rows_of_the_table"] for row in section.rows] == [20, 1280, 20, 1280]
    assert [call.args[1].workload.table_rows for call in made.call_args_list] == [20, 1280, 20, 1280]
    assert len(section.measures) == 2


def test_planning_counts_addresses_too() -> None:
    section = measure_planning(OPTIONS, quiet())
    parts = {str(row["what"]): row["ms"] for row in section.rows}
    assert len(parts) == 5
    assert all(isinstance(ms, Spread) and ms.median >= 0 for ms in parts.values())
    shares = [row["share_of_the_step"] for row in section.rows]
    assert section.measures[0].value == pytest.approx(shares[2] + shares[3])
