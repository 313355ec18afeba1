"""Checkpoints of the first format are read as ever."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.command_line import backbone, losses, newest, table_rows, train, write_job
from tests.train.checkpoint.format_1 import write_format_1
from train.checkpoint.checked import Damaged
from train.checkpoint.differences import differences
from train.checkpoint.format_1 import Format1Image
from train.checkpoint.open import open_image
from train.checkpoint.saved_image import find_rows
from train.use.saved_run import SavedRun


def as_format_1(run: Path, copy: Path) -> Path:
    """A copy of a run whose checkpoints are all of the first format."""
    shutil.copytree(run, copy)
    for path in sorted((copy / "checkpoints").iterdir()):
        image = open_image(path)
        write_format_1(image, copy / "old")
        shutil.rmtree(path)
        (copy / "old").rename(path)
    return copy


def test_it_is_the_same_image(trained: Path, tmp_path: Path) -> None:
    run = as_format_1(trained, tmp_path / "copy")
    old, today = newest(run), newest(trained)
    assert isinstance(old, Format1Image)
    assert (backbone(run), table_rows(run)) == (backbone(trained), table_rows(trained))
    assert [*old.faults()] == []
    assert all(part.differ == part.only_first == part.only_second == 0 for part in differences(old, today))
    ids = torch.arange(0, 3000, 7)
    found = [torch.zeros(len(ids), old.rows(old.spans[0]).records_NW.shape[1]) for _ in range(2)]
    assert torch.equal(find_rows(old, ids, found[0]), find_rows(today, ids, found[1]))
    assert torch.equal(*found)
    ones, others = SavedRun.open(run).model(), SavedRun.open(trained).model()
    assert all(torch.equal(one, others.state_dict()[name]) for name, one in ones.state_dict().items())


def test_a_run_goes_on_from_it_with_the_same_bits(trained: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    run = as_format_1(trained, tmp_path / "runs" / "small")
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    sections = {"train": {"steps": 6}, "optimizer": {"learning_rate": 0.01}, "checkpoint": {"every": 3}}
    train(write_job(tmp_path, corpus, **sections), "--nproc", "2")
    assert losses(run) == losses(trained)
    assert (backbone(run), table_rows(run)) == (backbone(trained), table_rows(trained))
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}


def test_damage_is_told(trained: Path, tmp_path: Path) -> None:
    path = as_format_1(trained, tmp_path / "copy") / "checkpoints" / "step-00000006"
    for name in ("state.json", "backbone.safetensors", "tables-00001-of-00002.safetensors"):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:100])
        with pytest.raises(Damaged, match=name):
            open_image(path)
        (path / name).write_bytes(data)
    open_image(path)
