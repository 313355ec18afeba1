"""Who is named when no rank makes progress."""

import pickle
import platform
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from train.ranks import job_store
from train.watch.flight_recorder import record_operations
from train.watch.hang import HangWatch, told
from train.watch.heartbeat import Beat, beat_path

BEAT = Beat(0, "node1", 10, 7, "exchange", 40, 0.0, 1.0)
OTHER = replace(BEAT, rank=1, host="node2", pid=11)


def later(*beats: Beat) -> list[Beat | None]:
    return [replace(beat, written=beat.written + 1) for beat in beats]


def test_a_rank_without_a_sign_of_life_is_named_with_where_it_was() -> None:
    stopped = replace(OTHER, stage="fetch", entered=39)
    assert told([BEAT, stopped], [*later(BEAT), stopped], 60) == (
        "rank 1 gave no sign of life any more: rank 1 was last seen in step 7, stage fetch, on node2, process 11"
    )
    assert "rank 1 was last seen nowhere" in told([BEAT, None], [*later(BEAT), None], 60)


def test_of_ranks_that_live_the_one_behind_is_named() -> None:
    behind = replace(OTHER, stage="plan", entered=37)
    assert told([BEAT, behind], later(BEAT, behind), 60) == (
        "rank 1 made no progress for 60 s in step 7, stage plan, on node2, process 11; others wait in step 7, stage "
        "exchange"
    )
    assert told([BEAT, OTHER], later(BEAT, OTHER), 60) == (
        "no rank made progress for 60 s: all are in step 7, stage exchange"
    )


def hung(folder: Path, stages: int) -> list[str]:
    """What is told of a rank that enters that many stages, one every tenth of a second, once its first step is done."""
    errors: list[str] = []
    ended = threading.Event()

    def leave(error: BaseException) -> None:
        errors.append(str(error))
        watch.heartbeat.stop()
        ended.set()

    watch = HangWatch(folder, 0, [0], 0.5, leave)
    watch.heartbeat.start()
    time.sleep(0.7)
    assert not errors, "the first step may take its time"
    watch.begin()
    for step in range(stages):
        watch.heartbeat.enter("compute", step + 1)
        time.sleep(0.1)
    assert not errors
    assert ended.wait(30)
    return errors


def test_a_rank_that_is_stuck_leaves_its_stacks_and_one_that_is_not_is_left_alone(tmp_path: Path) -> None:
    (error,) = hung(tmp_path, stages=10)
    assert error == (
        "train.hang_s: no rank made progress for 0.5 s: all are in step 10, stage compute; stacks of all threads: "
        f"{tmp_path / 'stacks'}"
    )
    stacks = (tmp_path / "stacks" / "step-00000010-rank-00000.txt").read_text()
    assert "in hung" in stacks
    beat = Beat.read(beat_path(tmp_path, 0))
    assert beat is not None
    assert (beat.rank, beat.step, beat.stage) == (0, 10, "compute")


def stuck_on_another_node(folder: Path) -> str:
    """What a rank tells whose exchange waits for rank 1, which is at work for ever; each has a folder of its own."""
    rank = dist.get_rank()
    platform.node = lambda: f"node-{rank}"
    own = folder / str(rank)
    errors: list[str] = []
    ended = threading.Event()

    def leave(error: BaseException) -> None:
        errors.append(str(error))
        ended.set()

    watch = HangWatch(own, rank, [rank], 1.0, leave, job_store())
    watch.heartbeat.start()
    watch.begin()
    watch.heartbeat.enter("compute", 3)
    if rank == 0:
        watch.heartbeat.enter("exchange")
    assert ended.wait(30)
    watch.heartbeat.stop()
    return errors[0]


def test_the_rank_that_others_wait_for_is_named_though_its_heartbeat_is_on_another_nodes_disk(tmp_path: Path) -> None:
    for error in run_ranks(stuck_on_another_node, 2, tmp_path):
        assert "rank 1 made no progress for 1 s in step 3, stage compute, on node-1, process " in error
        assert "others wait in step 3, stage exchange; stacks of all threads: " in error


def operations_of_a_hang(folder: Path) -> bytes:
    """What the flight recorder has left when a rank hung after an all-reduce."""
    record_operations(folder)
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(3), group=group)
    ended = threading.Event()
    watch = HangWatch(folder, dist.get_rank(), [dist.get_rank()], 0.5, lambda error: ended.set())
    watch.heartbeat.start()
    watch.begin()
    assert ended.wait(30)
    watch.heartbeat.stop()
    return (folder / "stacks" / f"nccl-rank-{dist.get_rank()}").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU, NCCL's operations are recorded")
def test_a_rank_that_hangs_leaves_its_last_operations_where_they_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    for left in run_ranks(operations_of_a_hang, 2, tmp_path):
        entries = pickle.loads(left)["entries"]
        assert ("gloo:all_reduce", [[3]]) in [(each["profiling_name"], each["input_sizes"]) for each in entries]
