"""Whatever part of the newest checkpoint is damaged, in whatever way, all ranks take the one before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.train.checkpoint.job import Parts
from tests.train.checkpoint.test_local import on_nodes
from train.checkpoint.content import Now
from train.checkpoint.listing import checkpoints_in


def flip_first(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def flip_middle(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + flip_first(data[half:])


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGES: tuple[Callable[[bytes], bytes], ...] = (flip_first, flip_middle, flip_last, cut, lambda data: b"")


def resumed_from(folder: Path, local: bool, config: dict[str, Any]) -> dict[str, Any]:
    """Saves steps 3 (in full), 4 and 5; damages each file of the newest in each way, and tells what was resumed.

    Of each node's own, with `local`. Files that an increment adds to are damaged too.
    """
    parts = Parts.open(folder, 1, local=local, config={"keep": 3} | config)
    for step in (3, 4, 5):
        parts.train(range(step - 1, step) if step > 3 else range(3))
        parts.checkpoints.save(step, Now(parts.engine, parts.tables))
    dist.barrier()
    parts.close()
    newest = checkpoints_in(folder)[-1].path
    mine = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    all_names: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(all_names, mine)
    found: dict[str, Any] = {}
    for name in sorted(set().union(*all_names)):
        for number, damage in enumerate(DAMAGES):
            found[f"{name} {number}"] = _resume_with(newest / name, damage, folder, local)
    return found


def _resume_with(path: Path, damage: Callable[[bytes], bytes], folder: Path, local: bool) -> Any:
    # On a disk that all share rank 0 does it; else the last rank whose node has the file.
    has: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(has, path.exists())
    mine = dist.get_rank() == max(rank for rank, there in enumerate(has) if there)
    data = path.read_bytes() if mine else b""
    if mine:
        path.write_bytes(damage(data))
    dist.barrier()
    parts = Parts.open(folder, 1, local=local)
    resumed = parts.checkpoints.resume(parts.engine, parts.tables)
    parts.close()
    dist.barrier()
    if mine:
        path.write_bytes(data)
    dist.barrier()
    return resumed.step, len(resumed.notes)


@pytest.mark.long
@pytest.mark.parametrize("config", [{}, {"incremental": 3}], ids=["full", "increment"])
def test_on_a_shared_disk(config: dict[str, Any], tmp_path: Path) -> None:
    for found in run_ranks(resumed_from, 2, tmp_path, False, config):
        assert len(found) == 5 * 5, "a manifest, and an index and a file of each rank"
        assert set(found.values()) == {(4, 1)}, found


@pytest.mark.long
def test_on_each_nodes_own_disk(tmp_path: Path) -> None:
    for found in on_nodes("ab", resumed_from, tmp_path, True, {}):
        assert {name.partition("/")[0] for name in found if "elsewhere" in name} == {"elsewhere"}
        # A manifest that differs from the other node's is a checkpoint of its own, of which a part is missing.
        wrong = {name: what for name, what in found.items() if what not in {(4, 1), (4, 2)}}
        assert not wrong, wrong
