"""What is told at the start of a run that differs from what its config lets one expect."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.command_line import JOB
from train.config.job import JobConfig
from train.report.notes import notes


def told(
    *, held_out: int = 4, fraction: float = 0.2, epoch: int = 5, world_size: int = 1, **sections: Any
) -> list[str]:
    values = {key: value | sections.get(key, {}) for key, value in JOB.items()}
    job = JobConfig.model_validate({"run": {"name": "x"}, "deepspeed": sections.get("deepspeed", {})} | values)
    training: Any = SimpleNamespace(steps_per_epoch=epoch, num_tokens=1000)
    validation: Any = SimpleNamespace(num_documents=held_out, validation_fraction=fraction)
    return list(notes(job, training, validation, world_size))


def test_nothing_is_told_of_a_plain_job() -> None:
    assert told() == []


def test_text_that_repeats_and_text_that_is_not_evaluated() -> None:
    assert told(epoch=2) == ["the text repeats: 5 steps are 2.5 epochs of 1,000 tokens"]
    assert told(held_out=0) == ["no evaluation: no document is held out, as it takes two documents"]
    assert told(held_out=0, fraction=0) == ["no evaluation: no document is held out, as data.validation_fraction is 0"]


@pytest.mark.parametrize(("stage", "dtype", "world_size", "count"), [
    (0, "bf16", 1, 4), (0, "bf16", 2, 2), (0, "bf16", 4, 0), (0, "fp32", 1, 0), (1, "bf16", 1, 0),
])  # fmt: skip
def test_gradients_that_are_summed_in_bf16(stage: int, dtype: str, world_size: int, count: int) -> None:
    found = told(deepspeed={"zero_optimization": {"stage": stage}}, train={"dtype": dtype}, world_size=world_size)
    assert len(found) == bool(count)
    assert not count or found[0].startswith(f"gradients of {count} micro-batches are summed in bf16")
