"""Threads beside the training loop work for the loop's GPU, not for GPU 0."""

import os
import sys
import threading
from typing import Any

import pytest
import torch

from offload.config import OffloadConfig
from offload.device.streams import HostStreams
from offload.device.workers import InlineWorker, background_worker
from offload.plan import planner
from offload.plan.planner import Planner
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.rows.shard import Shard
from offload.transfers import staged as transfers_staged
from offload.transfers.staged import StagedTransfers
from offload.window import store as window_store
from tests.offload.window.stores import open_window


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Which GPU each thread made its own, on a machine where the caller's is GPU 3."""
    chosen: dict[str, int] = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: chosen.update({threading.current_thread().name.split("_")[0]: gpu})
    )
    return chosen


@pytest.mark.parametrize(("device", "gpu"), [("cuda:2", 2), ("cuda", 3), ("cuda:0", 0)])
def test_a_thread_begins_with_its_device(device: str, gpu: int, gpus: dict[str, int]) -> None:
    with background_worker("worker", torch.device(device)) as worker:
        worker.submit(int).result()
    assert gpus == {"worker": gpu}


def test_a_thread_beside_a_loop_without_a_gpu_asks_for_none(gpus: dict[str, int]) -> None:
    with background_worker("worker", torch.device("cpu"), 2) as worker:
        assert worker.submit(torch.get_num_threads).result() == 2
    assert gpus == {}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread has no priority of its own")
def test_a_thread_and_those_that_it_starts_stand_back_and_the_loop_does_not() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def of_another() -> int:
        with background_worker("started", torch.device("cpu")) as started:
            return started.submit(priority).result()

    before = priority()
    with background_worker("worker", torch.device("cpu"), niceness=3) as worker:
        assert (worker.submit(priority).result(), worker.submit(of_another).result()) == (before + 3, before + 3)
    assert priority() == before


def test_work_that_is_done_inline_is_done_at_once_and_fails_at_once() -> None:
    assert InlineWorker().submit(threading.get_ident).result() == threading.get_ident()
    with pytest.raises(ValueError, match="invalid literal"):
        InlineWorker().submit(int, "x")


def test_every_thread_is_given_the_device_of_its_records(gpus: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the records, which are on a CPU, were on GPU 2."""

    def on_gpu(name: str, device: torch.device, *threads: int) -> Any:
        assert device == torch.device("cpu")
        return background_worker(name, torch.device("cuda", 2), *threads)

    for module in (window_store, planner, transfers_staged):
        monkeypatch.setattr(module, "background_worker", on_gpu)
    rows = torch.arange(3)
    shard = Shard(Sharding((9,), 1), 0, RecordLayout(4, 0), RowInit(3, 0.02))
    engine = StagedTransfers(torch.zeros(9, 5), torch.zeros(4, 5), shard, HostStreams())
    window = open_window(OffloadConfig(engine="zero_copy"), beside=True)
    plans = Planner(lambda batches: batches, lambda step: [], torch.device("cpu"))  # type: ignore[arg-type,return-value]
    engine.fetch(rows, rows, 3).wait()
    engine.write_back(rows, rows).wait()
    window.prepare(1, rows)
    plans.plan_now([])
    for part in (engine, window, plans):
        part.close()
    assert gpus == dict.fromkeys(("engram-fetch", "engram-writeback", "engram-window", "engram-plan"), 2)
