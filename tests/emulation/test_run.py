"""A small job over virtual time: the real tables and training loop, in the order in which they act."""

from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import pytest

from tests.emulation.device import VirtualEvent, VirtualStream
from tests.emulation.hardware import Hardware, read_hardware
from tests.emulation.report import depths_table, variants_table
from tests.emulation.results import Access, Run, Variant
from tests.emulation.run import run
from tests.emulation.workload import Part, Workload
from train.config.file import load
from train.config.job import JobConfig

TINY = Path(__file__).parents[2] / "configs/tiny.yaml"
DEPTHS = (0, 1, 2, 4)
WARMUP, STEPS = 4, 3
INFINITE = 1e30
COUNTED = 1e-3
"""Of a step, at most: resident rows have their updates counted by the device, a window's by a thread of the host."""
CLOSING = 2
"""Waits of an engine's end, one a direction."""


@pytest.fixture(scope="module")
def workload() -> Workload:
    overrides = [
        "data.path=no/such/folder",
        "model.engram.rows_per_head=400",
        "offload.window_rows=3300",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "data.sequence_length=32",
    ]
    return Workload(load(TINY, overrides, JobConfig), Part(), read_hardware("h200"))


def hardware(**link: float) -> Hardware:
    """A host that takes no time, and links as fast as they are said to be; else the H200's numbers."""
    h200 = read_hardware("h200")
    free = {"both_directions": 1.0, "beside_model": 1.0, "write_back_with_4_programs": 1.0, "lost_to_copies": 0.0}
    rates = dict.fromkeys(("fetch", "write_back", "copy_engine"), INFINITE)
    rates |= link
    return h200.model_copy(
        update={
            "rows": h200.rows.model_copy(update={"draw_seconds": 0.0}),
            "host": h200.host.model_copy(update={"launch_seconds": 0.0, "lost_to_each_thread": 0.0, "factor": 0.0}),
            "link": h200.link.model_copy(
                update=free | {f"{name}_bytes_per_second": rate for name, rate in rates.items()}
            ),
        }
    )


def emulated(workload: Workload, depth: int | None, on: Hardware, **how: Variant | bool) -> Run:
    return run(workload, on, depth, warmup=WARMUP, steps=STEPS, **how)  # type: ignore[arg-type]


def disordered(accesses: list[Access]) -> list[str]:
    """Accesses to the same row or slot, one of them a write, whose spans are not one after the other."""
    written: dict[tuple[str, int], float] = defaultdict(float)  # when the last write to a place ended
    read: dict[tuple[str, int], float] = defaultdict(float)
    found = []
    for access in accesses:
        (kind, read_from), (written_kind, written_to) = access.reads, access.writes
        for place in ((kind, number) for number in read_from.tolist()):
            if access.span.start < written[place]:
                found.append(f"{access.span.what} reads {place} before it is written")
            read[place] = max(read[place], access.span.end)
        for place in ((written_kind, number) for number in written_to.tolist()):
            if access.span.start < written[place] or (access.span.start < read[place] and access.reads[0] != place[0]):
                found.append(f"{access.span.what} writes {place} while it is read or written")
            written[place] = access.span.end
    return found


@pytest.mark.parametrize("engine", ["zero_copy", "staged", "mixed"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_copy_never_runs_before_what_it_depends_on_and_bits_are_those_of_resident(
    workload: Workload, depth: int, engine: str
) -> None:
    slow = hardware(fetch=2e8, write_back=1e8, copy_engine=1e8)
    found = emulated(workload, depth, slow, watched=True, variant=Variant(engine=engine))
    assert disordered(found.accesses) == []
    kinds = Counter((access.span.what, access.writes[0]) for access in found.accesses if len(access.writes[1]))
    written = ("write-back" if engine == "zero_copy" else "engram-writeback", "row")
    assert kinds[written] > 2, "nothing was written: the test would prove nothing"
    assert found.norms == emulated(workload, None, slow).norms


@pytest.mark.parametrize("depth", [0, 2])
def test_the_loop_waits_for_the_device_once_a_step_for_the_norm(workload: Workload, depth: int) -> None:
    waits: Counter[str] = Counter()
    wait = VirtualEvent.synchronize

    def counted(event: VirtualEvent) -> None:
        waits[event._simulation.thread.name] += 1
        wait(event)

    with mock.patch.object(VirtualEvent, "synchronize", counted):
        emulated(workload, depth, read_hardware("h200"))
    assert waits["loop"] - CLOSING == WARMUP + STEPS


def test_a_wait_that_is_left_out_is_noticed(workload: Workload) -> None:
    with mock.patch.object(VirtualStream, "wait_event"):
        assert disordered(emulated(workload, 2, hardware(fetch=2e8, write_back=1e8), watched=True).accesses)


@pytest.mark.parametrize("depth", [None, 0, 2])
def test_the_critical_path_adds_up_to_the_step(workload: Workload, depth: int | None) -> None:
    for step in emulated(workload, depth, read_hardware("h200")).steps:
        assert step.seconds > 0
        assert sum(step.path.values()) == pytest.approx(step.seconds, rel=1e-9)
        assert min(step.path.values()) >= -1e-12


@pytest.mark.parametrize("depth", DEPTHS)
def test_links_and_a_host_that_take_no_time_leave_no_stall(workload: Workload, depth: int) -> None:
    resident, window = (emulated(workload, each, hardware()) for each in (None, depth))
    assert [step.stall for step in window.steps] == [0.0] * STEPS
    assert window.seconds == pytest.approx(resident.seconds, rel=COUNTED)


def test_without_look_ahead_a_step_takes_as_much_longer_as_its_copies(workload: Workload) -> None:
    slow = hardware(fetch=2e8, write_back=1e8)
    resident, window = emulated(workload, None, slow), emulated(workload, 0, slow)
    for alone, step in zip(resident.steps, window.steps, strict=True):
        assert step.fetched > 0
        assert step.written > 0
        rows_in, rows_out = step.fetched * workload.record_bytes / 2e8, step.written * workload.record_bytes / 1e8
        assert step.path["rows in"] == pytest.approx(rows_in)
        assert step.path["rows out"] == pytest.approx(rows_out)
        assert step.seconds == pytest.approx(alone.seconds + rows_in + rows_out, rel=COUNTED)


def test_a_change_of_the_code_changes_what_it_should(workload: Workload) -> None:
    today, changed = (
        emulated(workload, 0, read_hardware("h200"), variant=each) for each in (Variant(), Variant(programs=4))
    )
    assert changed.mean(lambda step: step.copied) > today.mean(lambda step: step.copied)
    assert changed.norms == today.norms


def test_the_tables_fit_into_80_columns(workload: Workload) -> None:
    resident, window = (emulated(workload, depth, read_hardware("h200")) for depth in (None, 1))
    text = depths_table(resident, dict.fromkeys(DEPTHS, window), 1)
    text += variants_table({"the last four together": (resident, window)}, 1, 1)
    assert max(map(len, text.splitlines())) <= 80
    assert "depth 4" in text


def test_a_job_that_does_not_divide_is_told_so() -> None:
    job = load(TINY, ["data.path=no/such/folder"], JobConfig)
    with pytest.raises(ValueError, match=r"train\.global_batch_size: .* do not divide into 7 parts"):
        Workload(job, Part(scale=7), read_hardware("h200"))
