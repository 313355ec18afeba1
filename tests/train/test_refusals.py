"""Steps that are not applied: what they leave behind, what ends a run, and what is told."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train import refusals
from train.config.job import TrainConfig
from train.errors import UserError
from train.refusals import Refusals
from train.report.step import StepResult

GOOD = StepResult(torch.tensor(1.5), 1.0, 0.1, None)
SPIKE, NAN = (StepResult(torch.tensor(1.5), norm, 0.1, "its sins") for norm in (1.0, float("nan")))


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `Refusals` of two ranks that are alike, and the list of what it tells."""
    monkeypatch.setattr(refusals, "everyones", lambda loss: 2 * loss)

    def made(**config: Any) -> tuple[Refusals, list[Any]]:
        told: list[Any] = []
        loader: Any = SimpleNamespace(where=lambda step: {"batch": step + 4}, batch_number=lambda step: step + 3)
        reporter: Any = SimpleNamespace(refused=lambda number, result, *rest: told.append((number, *rest)))
        return Refusals(TrainConfig(steps=10, **config), loader, reporter, []), told

    return made


def test_a_spike_does_not_join_the_updates_that_later_steps_are_compared_with(judge: Any) -> None:
    its, _ = judge(on_spike="skip", spike_window=4, spike_sigma=1.0)
    assert [its.judge(1.0, 1.0) for _ in range(4)] == [None] * 4
    for _ in range(4):
        assert "is a spike" in its.judge(100.0, 1.0)
        assert "is not finite" in its.judge(1.0, float("inf"))
    assert its.recent == [(1.0, 1.0)] * 4


@pytest.mark.parametrize(("key", "result", "other"), [("on_spike", SPIKE, NAN), ("on_non_finite", NAN, SPIKE)])
def test_each_kind_of_bad_step_ends_a_run_by_its_own_key(
    key: str, result: StepResult, other: StepResult, judge: Any
) -> None:
    its, told = judge(**{"on_spike": "skip"} | {key: "stop"})
    its.tell(6, other, lambda step: "")
    with pytest.raises(
        UserError, match=rf"^train\.{key} is stop, and step 8 was .* sins; 7 are saved; .*=\[\[11,11\]\]"
    ):
        its.tell(7, result, lambda step: f"; {step} are saved")
    assert told == [(7, 3.0, {"batch": 10}), (8, 3.0, {"batch": 11})], "a loss is that of all ranks"


def test_only_steps_in_a_row_end_a_run(judge: Any) -> None:
    its, told = judge(max_skipped_steps=1)
    for step, result in enumerate([NAN, GOOD, NAN, GOOD, NAN]):
        its.tell(step, result, lambda _: "")
    with pytest.raises(UserError, match="2 steps in a row were skipped, the last one step 6: its sins"):
        its.tell(5, NAN, lambda _: "")
    assert [number for number, *_ in told] == [1, 3, 5, 6]
