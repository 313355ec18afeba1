"""Virtual time by hand-computed cases."""

import pytest

from tests.emulation.clock import Simulation, Span
from tests.emulation.critical_path import critical_path, spans_back
from tests.emulation.device import VirtualStreams, VirtualWorker
from tests.emulation.hardware import FETCH, MODEL, read_hardware


def simulated() -> tuple[Simulation, VirtualStreams]:
    """With threads whose Python takes no time: only what they are told to work does."""
    simulation = Simulation(host_factor=0.0)
    return simulation, VirtualStreams(simulation)


def test_a_fetch_under_a_model_is_hidden_but_for_what_is_longer() -> None:
    simulation, streams = simulated()
    copies, start = streams.new(), streams.compute.last
    simulation.work(1.0, "launches")
    streams.compute.launch(MODEL, 5.0)  # 1 to 6
    copies.launch(FETCH, 7.0)  # 1 to 8
    streams.compute.wait_event(copies.record_event())
    simulation.work(0.5, "launches")
    last = streams.compute.launch(MODEL, 2.0)  # 8 to 10
    simulation.wait(last)
    assert simulation.now == 10.0
    assert critical_path(last, start.end) == {"launches": 1.0, "rows in": 7.0, "model": 2.0, "interference": 0.0}
    assert critical_path(last, 5.0) == {"rows in": 3.0, "model": 2.0, "interference": 0.0}


def test_who_waits_for_a_thread_has_its_work_on_his_path() -> None:
    simulation, streams = simulated()
    worker = VirtualWorker(simulation, "engram-window")

    def decide() -> int:
        simulation.work(3.0, "engram-window")
        return 7

    decided = worker.submit(decide)
    simulation.work(1.0, "loop")
    assert not decided.done()
    assert decided.result() == 7
    assert simulation.now == 3.0
    last = streams.compute.launch(MODEL, 1.0)
    simulation.wait(last)
    assert critical_path(last, 0.0) == {"window's thread": 3.0, "model": 1.0, "interference": 0.0}
    worker.shutdown()


def test_a_workers_error_is_raised_where_its_result_is_asked_for() -> None:
    simulation, _ = simulated()
    worker = VirtualWorker(simulation, "engram-plan")
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result()
    worker.shutdown()


def test_work_slows_what_is_beside_it_for_as_long_as_it_lasts() -> None:
    def rate(span: Span, running: object) -> float:
        return 0.5 if span.what == MODEL and len(list(running)) > 1 else 1.0  # type: ignore[call-overload]

    simulation = Simulation(rate, host_factor=0.0)
    streams = VirtualStreams(simulation)
    model = streams.compute.launch(MODEL, 4.0)
    copy = streams.new().launch(FETCH, 2.0)
    simulation.wait(model)
    assert (copy.end, model.end) == (2.0, 5.0)  # 2 at half its speed, then 3
    assert critical_path(model, 0.0) == {"model": 4.0, "interference": 1.0}


def test_threads_that_all_wait_are_an_error_and_no_hang() -> None:
    simulation, _ = simulated()
    with pytest.raises(RuntimeError, match="nothing is at work"):
        simulation.sleep([])


def test_copies_beside_the_model_are_slower_and_the_more_so_both_ways() -> None:
    hardware = read_hardware("h200")
    rate, link = hardware.rate(8), hardware.link
    model, fetch, write = (Span("", what, 1.0) for what in ("model", "fetch", "write-back"))
    assert rate(fetch, [fetch]) == 1.0
    assert rate(fetch, [fetch, model]) == link.beside_model
    assert rate(fetch, [fetch, model, write]) == pytest.approx(link.beside_model * link.both_directions)
    assert rate(model, [fetch, model]) == 1 - link.lost_to_copies
    assert hardware.rate(4)(model, [fetch, model]) == 1 - link.lost_to_copies / 2


def test_an_unknown_machine_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match="no numbers of 'h300', only of h200"):
        read_hardware("h300")


def test_every_span_begins_when_its_cause_ends() -> None:
    simulation, streams = simulated()
    other = streams.new()
    for step in range(20):
        simulation.work(0.3, "launches")
        streams.compute.launch(MODEL, 0.1 + 0.07 * (step % 5))
        other.wait_event(streams.compute.record_event())
        other.launch(FETCH, 0.2)
        if step % 3 == 0:
            streams.compute.wait_event(other.record_event())
    last = streams.compute.launch(MODEL, 0.1)
    simulation.wait(last)
    path = [span for span in spans_back(last) if span.cause]
    assert all(span.start == span.cause.end for span in path)  # type: ignore[union-attr]
    assert len({span.where for span in path}) == 3, "the path keeps to one stream: the test would prove little"
