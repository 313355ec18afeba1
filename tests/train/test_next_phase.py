"""A run that begins with another's checkpoint, at a longer sequence length."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import RopeScalingConfig
from tests.command_line import losses, train, write_job
from train.checkpoint.checked import Damaged
from train.checkpoint.identity import Identity
from train.checkpoint.listing import find_checkpoint
from train.checkpoint.manifest import Manifest
from train.checkpoint.open import open_image
from train.errors import UserError
from train.use.export import export
from train.use.saved_run import SavedRun


def test_weights_rows_and_moments_are_taken_over_and_steps_begin_at_0(
    trained: Path, corpus: Path, tmp_path: Path
) -> None:
    """With next to no learning rate, nothing moves that was taken over."""
    job = write_job(
        tmp_path,
        corpus,
        train={"steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
        optimizer={"learning_rate": 1e-30},
        checkpoint={"init_from": str(trained)},
    )
    longer = "data.sequence_length=128", "model.attention.rope_scaling={factor: 4, original_length: 32}"
    train(job, *longer, "--nproc", "1")
    run = tmp_path / "runs" / "small"
    assert len(losses(run)) == 1
    before, after = SavedRun.open(trained), SavedRun.open(run)
    assert after.job.model.attention.rope_scaling == RopeScalingConfig(factor=4, original_length=32)
    assert (before.step, after.step) == (6, 1)
    assert after.image.manifest.steps_applied == 7, "Adam's bias correction would begin anew"
    bias = "e_score_correction_bias"
    for name, weight in after.weights().items():
        assert torch.equal(weight, before.weights()[name]) != name.endswith(bias), name
    for module, rows in enumerate(before.tables().num_rows):  # type: ignore[union-attr]
        ids = torch.arange(rows)
        assert torch.equal(after.tables().rows(module, ids), before.tables().rows(module, ids))  # type: ignore[union-attr]
    assert losses(run)[0][0] < losses(trained)[0][0] - 0.2
    export(after, tmp_path / "exported")
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    rope = exported["rope_parameters"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32)
    assert exported["max_position_embeddings"] == 128

    # Once it has a checkpoint, the same command goes on from that, with no need of the source.
    again = train(job, *longer, "train.steps=2", f"checkpoint.init_from={tmp_path / 'gone'}", "--nproc", "1")
    assert len(losses(run)) == 2
    assert SavedRun.open(run).image.manifest.steps_applied == 8
    assert "run.name=no-memory checkpoint.init_from=null" in again.stdout, "without it, what to try next is refused"


def _state(trained: Path) -> tuple[Manifest, Identity]:
    saved, _ = Manifest.read(find_checkpoint(str(trained), "checkpoint.init_from"))
    keys = ("model", "addresses", "data", "tokenizer")
    return saved, Identity(*(json.loads(json.dumps(getattr(saved, key))) for key in keys))


def _set(section: str, key: str, value: Any) -> Callable[[Identity], Any]:
    return lambda identity: getattr(identity, section).update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("model", "hidden_size", 48), "another model.hidden_size (32, now 48); take over that setting"),
        (lambda i: i.model["engram"].update(rows_per_head=600), "another model.engram.rows_per_head (500, now 600)"),
        (_set("addresses", "compressed_vocabulary", 7), "another addresses.compressed_vocabulary ("),
        (_set("data", "seed", 1), "another train.seed (0, now 1)"),
    ],
)
def test_weights_that_mean_something_else_are_refused(
    trained: Path, change: Callable[[Identity], Any], message: str
) -> None:
    state, identity = _state(trained)
    identity.same_weights(state)
    change(identity)
    with pytest.raises(ValueError, match=re.escape(message)):
        identity.same_weights(state)


def test_data_length_and_scaling_may_be_others(trained: Path) -> None:
    state, identity = _state(trained)
    identity.model["attention"]["rope_scaling"] = RopeScalingConfig().model_dump()
    identity.model["moe"]["balance_rate"] = 0.5
    for key in identity.data.keys() - {"seed"}:
        identity.data[key] = "another"
    identity.same_weights(state)
    with pytest.raises(ValueError, match=r"saved with another model\.attention\.rope_scaling"):
        identity.same_run(state)


def test_where_a_phase_begins(trained: Path, tmp_path: Path) -> None:
    steps, key = sorted((trained / "checkpoints").glob("step-*")), "checkpoint.init_from"
    assert find_checkpoint(str(trained), key) == steps[-1]
    assert find_checkpoint(str(steps[0]), key) == steps[0]
    with pytest.raises(UserError, match="is no checkpoint, and no run with one in it"):
        find_checkpoint(str(tmp_path), key)
    (tmp_path / "state.json").write_text('{"format": 1}')
    with pytest.raises(Damaged, match=r"state\.json is not that of a checkpoint"):
        open_image(find_checkpoint(str(tmp_path), key))
