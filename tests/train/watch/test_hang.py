"""Who is named when no rank makes progress."""

import threading
import time
from dataclasses import replace
from pathlib import Path

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
