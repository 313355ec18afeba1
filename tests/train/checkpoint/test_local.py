"""Nodes without a shared disk: each keeps its ranks' parts, which others get over the network."""

import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.train.checkpoint.job import Live, Parts
from tests.train.checkpoint.test_checkpoints import merged
from train.checkpoint.content import Now
from train.checkpoint.listing import checkpoints_in
from train.checkpoint.open import open_all
from train.checkpoint.part_reader import PartReader
from train.checkpoint.survey import Entry
from train.checkpoint.together import Failed
from train.errors import UserError


def on_nodes(nodes: str, act: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Runs `act(folder of its node, ...)` on a rank for each letter, which names the rank's node."""
    return run_ranks(_on_node, len(nodes), nodes, act, folder, *args)


def _on_node(nodes: str, act: Callable[..., Any], folder: Path, *args: Any) -> Any:
    node = nodes[dist.get_rank()]
    platform.node = lambda: f"node-{node}"
    return act(folder / node, *args)


def resume_and_save(folder: Path, steps: list[int], keep: int = 2) -> tuple[Any, Live, Live, int]:
    """What it went on from, or why not; what this rank then held and what at last; and the bytes that it read."""
    bytes_read = 0
    read = PartReader.read

    def counted(*args: Any) -> Any:
        nonlocal bytes_read
        found = read(*args)
        bytes_read += found.nbytes
        return found

    PartReader.read = counted  # type: ignore[method-assign]
    parts = Parts.open(folder, 1 + dist.get_world_size() % 3, local=True, config={"keep": keep})
    try:
        resumed = parts.checkpoints.resume(parts.engine, parts.tables)
    except UserError as error:
        return str(error), {}, {}, 0
    first, done, read_at_first = parts.live(), resumed.step, bytes_read
    for step in steps:
        parts.train(range(done, step))
        parts.fill(step)
        parts.checkpoints.save(step, Now(parts.engine, parts.tables))
        done = step
    return (resumed.step, resumed.notes), first, parts.live(), read_at_first


def survey_of(node: Path) -> list[Entry]:
    return [Entry.of(found.step, found.path, read=True) for found in checkpoints_in(node)]


def steps_on(folder: Path) -> dict[str, list[int]]:
    return {node.name: [found.step for found in checkpoints_in(node)] for node in sorted(folder.iterdir())}


def test_parts_travel_to_other_ranks_on_other_nodes_and_each_byte_is_read_once(tmp_path: Path) -> None:
    before: Live = {}
    for number, nodes in enumerate(("aa", "a", "abb", "ba", "cabb")):
        step = number + 3
        found, first, last, bytes_read = zip(*on_nodes(nodes, resume_and_save, tmp_path, [step]), strict=True)
        assert {told for told, _ in found} == {step - 1 if before else 0}, found
        assert not any(notes for _, notes in found)
        assert before in ({}, merged([*first]))
        values = sum(len(value) for value in before.values())
        ids = 8 * sum(1 for name, _ in before if name == "row")
        assert sum(bytes_read) == values + ids, nodes
        before = merged([*last])
    assert steps_on(tmp_path) == {"a": [6, 7], "b": [6, 7], "c": [7]}
    # The last save was by ranks 0 on c, 1 on a, 2 and 3 on b.
    (_, entry) = survey_of(tmp_path / "a")
    assert (entry.faults, entry.elsewhere, entry.ranks) == ([], [0, 2, 3], 4)
    path = tmp_path / "a" / "step-00000007"
    with pytest.raises(UserError, match="the parts of 1 of its 4 ranks; the others are on node-b, node-c: copy rank-"):
        open_all(path)
    for node in "bc":
        for part in (tmp_path / node / "step-00000007").glob("rank-*"):
            shutil.copy(part, path)
    assert survey_of(tmp_path / "a")[1].elsewhere == []
    assert not any(open_all(path).faults())
    (path / "rank-00001-000000.safetensors").write_bytes(b"")
    assert survey_of(tmp_path / "a")[1].faults[0].startswith("rank-00001-000000.safetensors has 0 bytes")


def test_a_node_that_is_gone_takes_its_parts_with_it(tmp_path: Path) -> None:
    on_nodes("a", resume_and_save, tmp_path, [3])
    on_nodes("abb", resume_and_save, tmp_path, [4, 5], 3)
    shutil.rmtree(tmp_path / "b")
    gone = "the parts that ranks 1, 2 saved on node node-b are on no node of this job"
    for (step, notes), *_ in on_nodes("ac", resume_and_save, tmp_path, []):
        assert step == 3
        assert [gone in note for note in notes] == [True, True]
    shutil.rmtree(tmp_path / "a" / "step-00000003")
    for told, *_ in on_nodes("ac", resume_and_save, tmp_path, []):
        assert f"step-00000005: {gone}: start it on nodes of which one has them; no checkpoint is whole" in told
    assert steps_on(tmp_path) == {"a": [4, 5], "c": []}


def rename_on_one_node_only(folder: Path) -> list[str]:
    import train.checkpoint.save as module

    parts = Parts.open(folder, 1, local=True)
    parts.train(range(3))
    parts.checkpoints.save(3, Now(parts.engine, parts.tables))
    told = []
    put = module.put_in_place
    if dist.get_rank() == 1:
        module.put_in_place = cast(Any, _full)
    try:
        parts.checkpoints.save(4, Now(parts.engine, parts.tables))
    except Failed as error:
        told.append(str(error))
    module.put_in_place = put
    resumed = parts.checkpoints.resume(parts.engine, parts.tables)
    return [*told, str(resumed.step), *resumed.notes]


def _full(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_some_nodes_have_not_renamed_or_missed_is_no_checkpoint(tmp_path: Path) -> None:
    for failed, step, note in on_nodes("ab", rename_on_one_node_only, tmp_path):
        assert failed == "rank 1 on node-b: no space left on device"
        assert step == "3"
        assert "step-00000004 was passed over: the parts that rank 1 saved on node node-b are on no node" in note
    # Node b misses a save of step 5, and has one of that name from before.
    on_nodes("ab", resume_and_save, tmp_path, [5])
    (tmp_path / "b" / "step-00000005").rename(tmp_path / "stale")
    on_nodes("ab", resume_and_save, tmp_path, [5])
    shutil.rmtree(tmp_path / "b" / "step-00000005")
    (tmp_path / "stale").rename(tmp_path / "b" / "step-00000005")
    for (step_, notes), *_ in on_nodes("ab", resume_and_save, tmp_path, [6]):
        assert step_ == 3
        assert [note.partition("step-00000005 ")[2].partition(" are on")[0] for note in notes] == [
            "was passed over: the parts that rank 1 saved on node node-b",
            "was passed over: the parts that rank 0 saved on node node-a",
        ]
    assert steps_on(tmp_path) == {"a": [3, 6], "b": [3, 6]}
