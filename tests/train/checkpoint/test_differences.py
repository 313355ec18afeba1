"""How two checkpoints differ, and what `engram checkpoint` says of a run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock

from launch.cli import main
from tests.train.checkpoint.small import write
from train.checkpoint.differences import Difference, differences
from train.checkpoint.listing import remove
from train.checkpoint.manifest import Base
from train.checkpoint.open import open_image
from train.checkpoint.survey import prune, survey
from train.errors import UserError


def test_each_part_is_compared_bit_by_bit(tmp_path: Path) -> None:
    first, second = (open_image(write(tmp_path, step=step, nonce=str(step))) for step in (4, 6))
    found = {part.part: part for part in differences(first, second)}
    assert found["weight"] == Difference("weight", compared=10, differ=10, largest=2.0)
    assert found["buffer"] == Difference("buffer", compared=2, differ=1, largest=2.0)
    # The version of one row of each rank is another; its weights are not.
    assert found["rows"] == Difference("rows", compared=6, differ=2, largest=0.0)
    assert all(part.differ == 0 for part in differences(first, first))


def test_what_only_one_has_is_counted(tmp_path: Path) -> None:
    one = open_image(write(tmp_path / "one"))
    other = open_image(write(tmp_path / "other"))
    one.spans = one.spans[:-1]
    one.tensors.pop("buffer/calls")
    found = {part.part: part for part in differences(one, other)}
    assert (found["rows"].only_first, found["rows"].only_second, found["rows"].compared) == (0, 3, 3)
    assert (found["buffer"].only_first, found["buffer"].only_second) == (0, 2)


def test_bits_are_compared_not_values() -> None:
    part = Difference("weight")
    part.add(torch.tensor([math.nan, 0.0, 1.0]), torch.tensor([math.nan, -0.0, 1.0]))
    assert part.differ == 1


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("")
    for step, skipped in ((2, 0), (4, 0), (5, 1)):
        write(tmp_path / "checkpoints", step=step, nonce=str(step), skipped_in_a_row=skipped)
    return tmp_path


def answer(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(main, ["checkpoint", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / "rank-00001-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_and_verify(run: Path) -> None:
    lines = answer("ls", str(run)).splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 2: whole", "step 4: whole", "step 5: whole"]
    assert "saved while steps were skipped" in lines[2]
    damage(run, 4)
    assert "damaged" not in answer("ls", str(run))
    told = json.loads(answer("verify", str(run), "--json", code=1))["checkpoints"]
    assert [len(entry["faults"]) for entry in told] == [0, 1, 0]
    assert "rank-00001-000000.safetensors is not what was saved" in told[1]["faults"][0]
    assert (told[0]["rows"], told[0]["ranks"], told[0]["good"]) == (6, 2, True)
    answer("verify", str(run), "--step", "2")
    assert "no checkpoint of step 3; there are: 2, 4, 5" in answer("verify", str(run), "--step", "3", code=2)


def test_increments(run: Path) -> None:
    """Steps 6 and 7 add to step 4, the last good one that is full."""
    folder = run / "checkpoints"
    base = Base(4, open_image(folder / "step-00000004").checksum)
    for step in (6, 7):
        write(folder, step=step, nonce=str(step), base=base, format=3)
    assert "step 6: whole, 0.0 MB, 6 rows since step 4, 2 rank(s)" in answer("ls", str(run))
    assert answer("verify", str(run), "--step", "7").startswith("step 7: whole")
    images = [open_image(folder / f"step-0000000{step}") for step in (6, 4)]
    found = {part.part: part for part in differences(*images)}
    assert found["rows"] == Difference("rows", compared=6, differ=2, largest=0.0)
    assert json.loads(answer("prune", str(run), "--keep", "1", "--json")) == {
        "removed": [2, 5, 6], "kept": [4, 7], "damaged": [],
    }  # fmt: skip
    damage(run, 4)
    told = answer("verify", str(run), "--step", "7", code=1)
    assert "  step-00000004: rank-00001-000000.safetensors is not what" in told
    with pytest.raises(UserError, match="no checkpoint is whole; nothing is removed"):
        prune(run, keep=1, keep_every=None, dry_run=False)


def test_diff(run: Path) -> None:
    steps = [str(run / "checkpoints" / f"step-0000000{step}") for step in (2, 4)]
    assert "weight: 10 of 10 differ, by 2 at most" in answer("diff", steps[0], str(run / "checkpoints/step-00000004"))
    assert json.loads(answer("diff", steps[0], steps[0], "--json"))["parts"][0]["differ"] == 0
    assert "is no checkpoint" in answer("diff", steps[0], "nowhere", code=2)
    damage(run, 4)
    assert f"{steps[0]} or {steps[1]}: rank-00001-" in answer("diff", *steps, code=2)


def test_diff_knows_a_run_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "runs" / "mine" / "checkpoints", step=2, nonce="2")
    monkeypatch.chdir(tmp_path)
    assert "weight: all 10 are equal" in answer("diff", "mine", "runs/mine")


def test_a_checkpoint_that_goes_while_it_is_looked_at_is_not_damaged(run: Path) -> None:
    entries = survey(run, read=True)
    assert next(entries).step == 2
    remove(run / "checkpoints" / "step-00000004")
    assert [(entry.step, entry.faults) for entry in entries] == [(5, [])]


def test_prune_leaves_alone_what_is_damaged_beyond_those_that_it_reads(run: Path) -> None:
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{")
    first = run / "checkpoints" / "step-00000001"
    first.mkdir()
    (first / "state.json").write_text("{}")
    found = prune(run, keep=1, keep_every=1, dry_run=False)
    assert (found.removed, found.kept, found.damaged) == ([], [4, 5], [1, 2])


def test_prune_keeps_what_is_whole(run: Path) -> None:
    for step in (6, 7):
        write(run / "checkpoints", step=step, nonce=str(step))
    damage(run, 7)
    assert json.loads(answer("prune", str(run), "--keep", "1", "--dry-run", "--json")) == {
        "removed": [2, 4, 5], "kept": [6], "damaged": [7],
    }  # fmt: skip
    assert len([*(run / "checkpoints").iterdir()]) == 5
    answer("prune", str(run), "--keep", "2", "--keep-every", "2")
    assert sorted(path.name[-1] for path in (run / "checkpoints").iterdir()) == ["2", "4", "6", "7"]
    damage(run, 6)
    damage(run, 4)
    damage(run, 2)
    with pytest.raises(UserError, match="no checkpoint is whole; nothing is removed"):
        prune(run, keep=1, keep_every=None, dry_run=False)
    with FileLock(run / ".lock"):
        assert "a run is at work in it" in answer("prune", str(run), "--keep", "1", code=2)
