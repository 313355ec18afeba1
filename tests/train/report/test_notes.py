"""What is told at the start of a run that differs from what its config lets one expect."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.command_line import JOB
from train.config.job import JobConfig
from train.data.batches.course import Seen
from train.data.stores.shards import ShardedTokens
from train.loaders import HeldOut
from train.report.notes import notes


def told(
    *, held_out: int = 4, fraction: float = 0.2, epoch: int = 5, world_size: int = 1, tokens: Any = (), **sections: Any
) -> list[str]:
    values = {key: value | sections.get(key, {}) for key, value in JOB.items()}
    job = JobConfig.model_validate({"run": {"name": "x"}, "deepspeed": sections.get("deepspeed", {})} | values)
    names = [source.called for source in job.data.first_mix] or [""]
    training: Any = SimpleNamespace(
        num_tokens=1000,
        sources=[SimpleNamespace(name=name, epochs=4.0, store=SimpleNamespace(tokens=tokens)) for name in names],
        seen=lambda steps: dict.fromkeys(names, Seen(2560, steps / epoch)),
        lines=SimpleNamespace(padding=dict),
        phase_starts=lambda steps: [0, *(p.after_steps for p in job.data.phases if p.after_steps < steps)],
    )
    validation: Any = SimpleNamespace(num_documents=held_out, validation_fraction=fraction)
    return list(notes(job, training, [HeldOut("", 1.0, validation)], world_size))


def test_nothing_is_told_of_a_plain_job() -> None:
    assert told() == []


def test_text_that_repeats_and_text_that_is_not_evaluated() -> None:
    assert told(epoch=2) == ["the text repeats: 5 steps are 2.5 epochs of 1,000 tokens"]
    assert told(held_out=0) == ["no evaluation: no document is held out, as it takes two documents"]
    assert told(held_out=0, fraction=0) == ["no evaluation: no document is held out, as data.validation_fraction is 0"]


def test_a_source_that_is_repeated_more_often_than_it_may_be() -> None:
    data = {"mix": "3 data/web 1 data/code"}
    assert told(data=data, epoch=2) == []
    assert told(data=data, epoch=1) == [
        f"{name} repeats: this run takes 2,560 tokens of it, 5.0 epochs, more than the 4 of its epochs; lower its "
        "weight, or raise epochs"
        for name in ("web", "code")
    ]


def test_phases_are_told_with_their_learning_rates() -> None:
    code = [{"path": "data/web", "weight": 1}, {"path": "data/code", "weight": 3}]
    phases = [{"after_steps": 3, "mix": code, "sequence_length": 64}, {"after_steps": 9, "sequence_length": 32}]
    assert told(data={"path": "data/web", "phases": phases}, schedule={"shape": "constant", "warmup_steps": 2}) == [
        "phase 1 from step 1: web 100.0%, 32 tokens a sequence, learning rate 2.00e-04",
        "phase 2 from step 4: web 25.0%, code 75.0%, 64 tokens a sequence, learning rate 4.00e-04",
        "phase 3 is never reached: it begins after 9 batches",
    ]


@pytest.mark.parametrize(("stage", "dtype", "world_size", "count"), [
    (0, "bf16", 1, 4), (0, "bf16", 2, 2), (0, "bf16", 4, 0), (0, "fp32", 1, 0), (1, "bf16", 1, 0),
])  # fmt: skip
def test_gradients_that_are_summed_in_bf16(stage: int, dtype: str, world_size: int, count: int) -> None:
    found = told(
        deepspeed={"zero_optimization": {"stage": stage}},
        train={"dtype": dtype, "micro_batch_size": 2},
        world_size=world_size,
    )
    assert len(found) == bool(count)
    assert not count or found[0].startswith(f"gradients of {count} micro-batches are summed in bf16")


def test_a_store_by_url_that_the_cache_cannot_hold_and_that_is_shuffled_whole() -> None:
    tokens = ShardedTokens(SimpleNamespace(limit=10_000), np.dtype(np.uint16), 8_000, 512)  # type: ignore[arg-type]
    (note,) = told(tokens=tokens)
    assert note == (
        "the text has 16 shards by URL, data.cache_bytes has room for 9, and all of it is shuffled: nearly each "
        "document takes a shard; set data.shuffle_window, or raise data.cache_bytes"
    )
    assert told(tokens=tokens, data={"shuffle_window": 10_000}) == []
    assert told(tokens=ShardedTokens(SimpleNamespace(limit=20_000), np.dtype(np.uint16), 8_000, 512)) == []  # type: ignore[arg-type]
