"""Real ranks save, resume at other sizes, and agree."""

import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.train.checkpoint.job import Live, Parts, load_all, messages, save_steps, with_full_disk
from train.checkpoint.content import Now
from train.checkpoint.listing import checkpoints_in
from train.checkpoint.open import open_image

SAVED = {1: 1, 2: 3, 3: 2, 4: 0}
"""ZeRO stage by the number of ranks that save."""


def merged(lives: list[Live]) -> Live:
    """What all ranks hold together, none of it twice."""
    assert sum(map(len, lives)) == len(set(itertools.chain(*lives)))
    return {key: value for live in lives for key, value in live.items()}


def reshard(folder: Path, saved: dict[int, int], loaded: dict[int, list[int]]) -> None:
    before = {ranks: merged([r[-1] for r in run_ranks(save_steps, ranks, folder / str(ranks), stage, [3])])
              for ranks, stage in saved.items()}  # fmt: skip
    assert all(len([key for key in live if key[0] == "row"]) > 60 for live in before.values())
    folders = [folder / str(ranks) for ranks in saved]
    for ranks, stages in loaded.items():
        by_rank = run_ranks(load_all, ranks, folders, stages)
        for number, (saved_ranks, stage) in enumerate(itertools.product(saved, stages)):
            steps, lives, notes = zip(*(found[number] for found in by_rank), strict=True)
            assert steps == (3,) * ranks
            assert not any(notes)
            assert merged(list(lives)) == before[saved_ranks], (saved_ranks, ranks, stage)


def test_any_ranks_and_zero_stage_take_up_what_others_saved(tmp_path: Path) -> None:
    reshard(tmp_path, {1: 1, 2: 3}, {1: [3], 2: [1, 2], 3: [2]})


@pytest.mark.long
def test_all_pairs_of_one_to_four_ranks_and_zero_stages(tmp_path: Path) -> None:
    reshard(tmp_path, SAVED, {ranks: [0, 1, 2, 3] for ranks in range(1, 5)})


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def save_and_damage(folder: Path) -> Any:
    """Saves steps 3 and 6; then resumes from the second, of which what only rank 1 reads is damaged."""
    three, _ = save_steps(folder, 2, [3, 6])
    if dist.get_rank() == 0:
        flip(folder / "step-00000006" / "rank-00001-000000.safetensors")
    dist.barrier()
    return three, load_all([folder], [2])[0]


def test_what_one_rank_finds_damaged_all_pass_over_and_forget(tmp_path: Path) -> None:
    """Rows that the damaged one had and the other has not must be gone again."""
    results = run_ranks(save_and_damage, 2, tmp_path)
    for three, (step, live, notes) in results:
        assert step == 3
        assert live == three
        assert len(notes) == 1
        assert "step-00000006 was passed over: rank 1 on " in notes[0]
        assert "rank-00001-000000.safetensors is not what was saved" in notes[0]
    flip(tmp_path / "step-00000003" / "manifest.json")
    for message in run_ranks(messages, 2, tmp_path, resume):
        assert "no checkpoint is whole: delete" in message[0]


def resume(parts: Parts, _: int) -> Any:
    return parts.checkpoints.resume(parts.engine, parts.tables).step


def resume_elsewhere(parts: Parts, rank: int) -> Any:
    """Rank 1 sees in the same place what another save has left."""
    import train.checkpoint.choice as module

    def other(path: Path) -> Any:
        return open_image(path.parents[1] / "other" / path.name)

    module.open_image = other if rank == 1 else open_image
    return resume(parts, rank)


def probe_elsewhere(parts: Parts, rank: int) -> Any:
    """Rank 1 sees nothing of what rank 0 makes."""
    if rank == 1:
        exists = Path.exists
        Path.exists = lambda self: "probe" not in self.name and exists(self)  # type: ignore[method-assign]
    return parts.checkpoints.probe()


def test_ranks_that_see_other_files_are_refused_together(tmp_path: Path) -> None:
    for name in ("one", "other"):
        run_ranks(save_steps, 1, tmp_path / name, 1, [3])
    (first,), (second,) = run_ranks(messages, 2, tmp_path / "one", resume_elsewhere)
    assert first == second
    assert "is that of another save, while rank 0 can read it: set run.dir to a folder on a disk that all" in first
    shutil.rmtree(tmp_path / "other")
    (first,), (second,) = run_ranks(messages, 2, tmp_path / "one", resume_elsewhere)
    assert first == second
    assert "cannot be read" in first or "is missing, while rank 0 can read it" in first
    (first,), (second,) = run_ranks(messages, 2, tmp_path / "probed", probe_elsewhere)
    assert first == second
    assert "rank 1 on " in first
    assert "which rank 0 has made: set run.dir to a folder on a disk that all nodes share" in first
    assert list((tmp_path / "probed").iterdir()) == []


def full_on_rank_1(parts: Parts, rank: int) -> Any:
    parts.checkpoints.probe()
    parts.train(range(3))
    parts.checkpoints.save(3, Now(parts.engine, parts.tables))

    def save() -> Path:
        return parts.checkpoints.save(4, Now(parts.engine, parts.tables))

    return with_full_disk(save) if rank == 1 else save()


def test_a_full_disk_of_one_rank_ends_the_save_of_all_and_leaves_what_there_was(tmp_path: Path) -> None:
    (first,), (second,) = run_ranks(messages, 2, tmp_path, full_on_rank_1)
    assert first == second
    assert "rank 1 on " in first
    assert first.endswith("rank-00001-000000.safetensors: no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
    assert open_image(tmp_path / "step-00000003").manifest.step == 3


def skip_and_save(parts: Parts, _: int) -> Any:
    for step, skipped in ((1, 0), (2, 0), (3, 0), (4, 1), (5, 2)):
        parts.checkpoints.save(step, Now(parts.engine, parts.tables, skipped))
    resumed = parts.checkpoints.resume(parts.engine, parts.tables)
    return resumed.step, resumed.notes


def test_what_is_saved_while_steps_are_skipped_displaces_nothing_and_is_passed_over(tmp_path: Path) -> None:
    (message,) = run_ranks(messages, 1, tmp_path, skip_and_save)[0]
    assert "step-00000005 was passed over: it was saved after 2 skipped step(s)" in message
    assert message.startswith("nothing: (3, ")
    assert [found.step for found in checkpoints_in(tmp_path)] == [2, 3, 5]


def test_other_data_are_refused_or_recorded(tmp_path: Path) -> None:
    run_ranks(save_steps, 1, tmp_path, 1, [3])
    for changed, expected in (
        ({"fingerprint": "g"}, "nothing: (3, ['data.allow_change: from here on with another data.fingerprint"),
        ({"fingerprint": "g", "seed": 1}, "another train.seed (0, now 1)"),
    ):
        (message,) = run_ranks(resume_other_data, 1, tmp_path, changed)[0]
        assert expected in message
    changes = open_image(tmp_path / "step-00000004").manifest.data_changes
    assert changes == [{"step": 3, "change": 'data.fingerprint ("f", now "g")'}]


def resume_other_data(folder: Path, data: dict[str, Any]) -> list[str]:
    def act(parts: Parts, _: int) -> Any:
        resumed = parts.checkpoints.resume(parts.engine, parts.tables)
        parts.checkpoints.save(4, Now(parts.engine, parts.tables))
        return resumed.step, resumed.notes

    return messages(folder, act, **data)


def save_and_log(folder: Path) -> list[str]:
    """What is synced and renamed during a save, in order, by name."""
    parts, log = Parts.open(folder, 1), []
    parts.train(range(2))
    fsync, replace = os.fsync, Path.replace

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def logged_replace(path: Path, target: Path) -> Path:
        log.append(f"{path.name} -> {target.name}")
        return replace(path, target)

    os.umask(0o027)
    os.fsync, Path.replace = logged_fsync, logged_replace  # type: ignore[assignment, method-assign]
    parts.checkpoints.save(2, Now(parts.engine, parts.tables))
    return log


@pytest.mark.skipif(sys.platform != "linux", reason="names files by /proc")
def test_all_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path: Path) -> None:
    (log,) = run_ranks(save_and_log, 1, tmp_path / "run")
    (partial,) = {name for name in log if name.endswith(".partial")}
    files = ["rank-00000-000000.safetensors", "rank-00000.json", "manifest.json"]
    assert log == [*files, partial, f"{partial} -> step-00000002", "run"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "run" / "step-00000002").iterdir()}
    assert modes == dict.fromkeys(files, 0o640), "modes follow the umask"
