"""Clocks, deadlines, and memory on both sides of a link."""

import time

import pytest
import torch

from kernels.records import fetch_records, write_records
from launch.bench.clock import CpuClock, clock_of, matmul_rate, memory_rate
from launch.bench.deadline import Deadline
from launch.bench.host_link import HostLink

CPU = torch.device("cpu")


def test_what_prepares_a_run_is_not_counted_and_comes_before_each() -> None:
    calls: list[str] = []

    def prepare() -> None:
        calls.append("prepare")
        time.sleep(0.02)

    spread = CpuClock(0.0).time(lambda: calls.append("run"), prepare)
    assert calls == ["prepare", "run"] * (len(calls) // 2)
    assert len(calls) // 2 >= 5
    assert 0 < spread.p10 <= spread.median <= spread.p90
    assert spread.median < 15


def test_rates_follow_from_the_time_and_what_was_moved() -> None:
    class Fixed:
        def time(self, run, prepare=None):  # type: ignore[no-untyped-def]
            from launch.bench.measure import Spread

            run()
            return Spread(2.0, 1.0, 3.0)

    assert memory_rate(CPU, Fixed(), 4000) == 2 * 4000 / 2e-3
    assert matmul_rate(CPU, Fixed(), 8, torch.float32) == 2 * 8**3 / 2e-3


def test_a_deadline_knows_what_fits() -> None:
    assert Deadline(None).allows(1e9)
    deadline = Deadline(10.0)
    assert deadline.allows(9.0)
    assert not deadline.allows(10.5)
    assert not Deadline(-1.0).allows(0.0)


@pytest.mark.parametrize("words", [40, 241])
def test_records_of_a_link_are_ones_that_were_updated(words: int) -> None:
    link = HostLink(CPU, 1 << 20, 1 << 18)
    try:
        rows, slots = link.draw_rows(100, words, ordered=True), link.draw_slots(100)
        assert rows.equal(rows.sort().values)
        assert not link.draw_rows(100, words, ordered=False).equal(rows)
        host_RW, window_CW = link.host_records(words), link.device_records(words)
        assert len(host_RW) == (1 << 18) // words
        window_CW.zero_()
        fetch_records(host_RW, rows, window_CW, slots)
        assert (window_CW.view(torch.int32)[:100] == 1).all()
        window_CW.fill_(7.0)
        write_records(window_CW, slots, host_RW, rows)
        assert (host_RW[rows] == 7).all()
        assert link.copy_rate(clock_of(CPU, 0.0), to_device=True) > 0
    finally:
        link.close()


@pytest.mark.gpu
def test_a_gpu_is_timed_by_events_without_the_hosts_time() -> None:
    device = torch.device("cuda")
    clock = clock_of(device, 0.05)
    x = torch.zeros(1024, device=device)
    assert clock.time(lambda: [x.add_(1) for _ in range(10)]).median < 0.2
    assert memory_rate(device, clock, 1 << 28) > 1e11
