"""Saves beside the training loop, by real ranks: with the bits of one that training waits for."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

import train.checkpoint.content
import train.checkpoint.parts
from offload.config import OffloadConfig
from offload.rows import snapshot
from tests.distributed import run_ranks
from tests.train.checkpoint.job import Parts, load_all, messages, with_full_disk
from train.checkpoint.content import Now
from train.checkpoint.differences import differences
from train.checkpoint.listing import checkpoints_in
from train.checkpoint.open import open_image

STEP, LAST = 3, 12
STORES = {
    "resident": {"mode": "resident"},
    "tiny-0": {"window_rows": 60, "depth": 0},
    "tiny-2": {"window_rows": 60, "depth": 2},
    "all-2": {"depth": 2},
}


@contextmanager
def slow_disk() -> Iterator[threading.Event]:
    """Small pieces and files, of which none gets through before the event."""
    passes, write_all = threading.Event(), train.checkpoint.parts.write_all

    def write(*args: Any) -> None:
        assert passes.wait(60)
        write_all(*args)

    with (
        mock.patch.object(train.checkpoint.content, "PIECE_BYTES", 400),
        mock.patch.object(train.checkpoint.parts, "FILE_BYTES", 1000),
        mock.patch.object(train.checkpoint.parts, "write_all", write),
        mock.patch.object(snapshot, "_PART_ROWS", 16),
    ):
        try:
            yield passes
        finally:
            passes.set()


def save_both_ways(folder: Path, stores: dict[str, dict[str, Any]]) -> list[int]:
    """Saves one step at once and beside the loop; returns how many steps passed during each of the latter."""
    passed = []
    for store, options in stores.items():
        offload = OffloadConfig(**options)
        for way in ("at once", "beside"):
            parts = Parts.open(folder / store / way, 1, offload=offload)
            parts.train(range(STEP))
            parts.fill(STEP)
            with slow_disk() as passes:
                if way == "at once":
                    passes.set()
                    parts.checkpoints.save(STEP, Now(parts.engine, parts.tables))
                else:
                    parts.checkpoints.save_beside(STEP, Now(parts.engine, parts.tables))
                    passed.append(0)
                    for step in range(STEP, LAST):
                        parts.train(range(step, step + 1))
                        parts.fill(step + 1)
                        passed[-1] += not parts.checkpoints.take_ended()
                    passes.set()
                    (ended,) = parts.checkpoints.take_ended(wait=True)
                    assert ended.path == folder / store / way / "step-00000003"
                    assert parts.checkpoints.take_ended(wait=True) == []
            parts.close()
    return passed


def all_bits(path: Path) -> Any:
    """Every value of a checkpoint with its place, and what it says of itself but for what each save draws anew."""
    image = open_image(path)
    assert [*image.faults()] == []
    pieces = [(piece.tensor, piece.start, piece.values.numpy().tobytes()) for piece in image.pieces(lambda *_: True)]
    rows = [tuple(part.numpy().tobytes() for part in image.rows(span) if part is not None) for span in image.spans]
    said = {key: value for key, value in vars(image.manifest).items() if key not in ("nonce", "ranks", "saved_at")}
    return pieces, rows, said


@pytest.mark.parametrize("stores", [("resident", "tiny-2"), pytest.param((*STORES,), marks=pytest.mark.long)], ids=len)
def test_what_is_saved_while_many_steps_pass_has_the_bits_of_a_save_that_they_wait_for(
    stores: tuple[str, ...], tmp_path: Path
) -> None:
    for passed in run_ranks(save_both_ways, 2, tmp_path, {store: STORES[store] for store in stores}):
        assert passed == [LAST - STEP] * len(stores), "no step passed during a save: the test would prove nothing"
    for store in stores:
        saved = [all_bits(tmp_path / store / way / "step-00000003") for way in ("at once", "beside")]
        assert saved[0] == saved[1], store


def save_twice(parts: Parts, rank: int) -> Any:
    """The second save begins while the disk holds the first one up on rank 1."""
    parts.train(range(STEP))
    with slow_disk() as passes:
        if rank == 0:
            passes.set()
        parts.checkpoints.save_beside(STEP, Now(parts.engine, parts.tables))
        parts.train(range(STEP, STEP + 1))
        threading.Timer(0.5, passes.set).start()
        parts.checkpoints.save_beside(STEP + 1, Now(parts.engine, parts.tables))
        (first,) = parts.checkpoints.take_ended()
        (second,) = parts.checkpoints.take_ended(wait=True)
    return first.step, first.waited_s > 0.1, second.step


def test_a_save_waits_for_the_one_before(tmp_path: Path) -> None:
    for (message,) in run_ranks(messages, 2, tmp_path, save_twice):
        assert message == "nothing: (3, True, 4)"
    assert [found.step for found in checkpoints_in(tmp_path)] == [3, 4]


def full_on_rank_1(parts: Parts, rank: int) -> Any:
    parts.train(range(STEP))
    parts.checkpoints.save(STEP, Now(parts.engine, parts.tables))

    def save() -> Any:
        parts.checkpoints.save_beside(STEP + 1, Now(parts.engine, parts.tables))
        return parts.checkpoints.take_ended(wait=True)

    (ended,) = with_full_disk(save) if rank == 1 else save()
    parts.train(range(STEP, LAST))
    parts.checkpoints.save(LAST, Now(parts.engine, parts.tables))
    return ended.step, ended.path, ended.error


def test_a_full_disk_is_told_and_training_goes_on(tmp_path: Path) -> None:
    (first,), (second,) = run_ranks(messages, 2, tmp_path, full_on_rank_1)
    assert first == second
    assert first.startswith("nothing: (4, None, 'rank 1 on ")
    assert first.endswith("rank-00001-000000.safetensors: no space left on device')")
    assert [found.step for found in checkpoints_in(tmp_path)] == [3, 12]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = "size=2m,nr_inodes=100"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(folder: Path, *, names: bool) -> None:
    """Leaves room for a few small files, or for a few names of files."""
    folder.mkdir()
    try:
        for number in range(1000):
            (folder / str(number)).write_bytes(b"" if names else bytes(4096))
    except OSError:
        for kept in range(number - 4, number):
            (folder / str(kept)).unlink()


def full_for_real(parts: Parts, rank: int) -> Any:
    """Saves beside the loop once with no room for all bytes, once with none for all files."""
    folder, errors = parts.checkpoints.folder, []
    parts.train(range(STEP))
    parts.checkpoints.save(STEP, Now(parts.engine, parts.tables))
    for names in (False, True):
        if rank == 0:
            fill(folder / "filled", names=names)
        dist.barrier()
        with slow_disk() as passes:
            passes.set()
            parts.checkpoints.save_beside(STEP + 1, Now(parts.engine, parts.tables))
            (ended,) = parts.checkpoints.take_ended(wait=True)
        errors.append(ended.error)
        if rank == 0:
            shutil.rmtree(folder / "filled")
        dist.barrier()
    parts.train(range(STEP, LAST))
    parts.checkpoints.save(LAST, Now(parts.engine, parts.tables))
    return errors


def test_a_disk_without_room_for_bytes_or_files_ends_the_save_alone_and_one_that_is_read_only_the_start(
    small_disk: Path,
) -> None:
    (first,), (second,) = run_ranks(messages, 2, small_disk, full_for_real)
    assert first == second
    assert re.fullmatch(r"nothing: \['(rank . on \S+: \S*/rank-\S+: no space left on device(', ')?){2}'\]", first)
    assert [found.step for found in checkpoints_in(small_disk)] == [3, 12]
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (first,), (second,) = run_ranks(messages, 2, small_disk, probe)
    assert first == second
    assert re.fullmatch(r"rank 0 on \S+: \S*/\.probe\.\S*: read-only file system", first)


def probe(parts: Parts, _: int) -> None:
    parts.checkpoints.probe()


def broken(parts: Parts, _: int) -> Any:
    """What is no matter of the disk goes wrong on the thread that saves; the next save finds nothing in its way."""
    with mock.patch.object(train.checkpoint.parts.PartWriter, "finish", side_effect=KeyError("a mistake")):
        parts.checkpoints.save_beside(STEP, Now(parts.engine, parts.tables))
        with pytest.raises(KeyError, match="a mistake"):
            parts.checkpoints.take_ended(wait=True)
    return parts.checkpoints.save(STEP, Now(parts.engine, parts.tables)).name


def test_any_other_error_of_the_thread_is_raised_in_the_loop(tmp_path: Path) -> None:
    assert run_ranks(messages, 1, tmp_path, broken) == [["nothing: step-00000003"]]


def save_increments(folder: Path, steps: list[int], keep: int) -> list[Any]:
    """Saves after each of some steps, one of three in full; resumes from each, and returns whether all bits are there.

    Every other save is made beside the loop.
    """
    parts = Parts.open(folder, 1, config={"incremental": 3, "keep": keep})
    done, seen = 0, []
    for number, step in enumerate(steps):
        parts.train(range(done, step))
        parts.fill(step)
        if number % 2:
            parts.checkpoints.save_beside(step, Now(parts.engine, parts.tables))
            parts.checkpoints.take_ended(wait=True)
        else:
            parts.checkpoints.save(step, Now(parts.engine, parts.tables))
        ((found, live, notes),) = load_all([folder], [1])
        there = [found.step for found in checkpoints_in(folder)]
        seen.append((found, live == parts.live(), notes, there))
        done = step
    parts.close()
    return seen


def test_increments_are_restored_exactly_and_the_full_save_that_they_need_stays(tmp_path: Path) -> None:
    expected = [[2], [2, 4], [2, 6], [8], [8, 10]]
    for seen in run_ranks(save_increments, 2, tmp_path, [2, 4, 6, 8, 10], 1):
        assert seen == [(there[-1], True, [], there) for there in expected]
    images = [open_image(path) for _, path in checkpoints_in(tmp_path)]
    rows = [image.manifest.num_rows for image in images]
    assert 0 < rows[1] < rows[0], "the increment has only what was updated"
    assert [image.manifest.base.step if image.manifest.base else None for image in images] == [None, 8]
    by_part = {part.part: part for part in differences(images[1], images[0])}
    assert by_part["rows"].compared == rows[0], "each row once"
    # A row updated only in steps 9 and 10 is in the increment alone.
    assert by_part["rows"].only_first == len({row for image in images for row in row_ids(image)}) - rows[0]
    assert by_part["rows"].only_second == 0
    assert 0 < by_part["rows"].differ <= rows[1]


def row_ids(image: Any) -> list[int]:
    return [row for span in image.spans for row in image.rows(span).ids_N.tolist()]


def test_an_increment_whose_full_save_is_damaged_missing_or_another_one_is_passed_over(tmp_path: Path) -> None:
    run_ranks(save_increments, 1, tmp_path / "run", [2, 4, 6, 8, 10], 9)
    run = tmp_path / "run"
    full = run / "step-00000008"
    part = full / "rank-00000-000000.safetensors"
    data = part.read_bytes()
    part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert [*open_image(run / "step-00000010").faults()] == [
        "step-00000008: rank-00000-000000.safetensors is not what was saved (the checksum of counts@97 differs)"
    ]
    ((step, _, notes),) = run_ranks(load_all, 1, [run], [1])[0]
    assert step == 6
    assert "step-00000010 was passed over: rank 0 on " in notes[0]
    full.rename(run / "elsewhere")
    (run / "step-00000006").rename(full)
    ((step, _, notes),) = run_ranks(load_all, 1, [run], [1])[0]
    assert step == 6
    assert "step-00000008 is not the full save that it adds to" in notes[0]
    full.rename(run / "step-00000006")
    ((step, _, notes),) = run_ranks(load_all, 1, [run], [1])[0]
    assert step == 6
    assert "step-00000008, the full save that it adds to: manifest.json is missing" in notes[0]
