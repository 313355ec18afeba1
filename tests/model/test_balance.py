"""The bias moves against the load, by the rate, once a call, from counts summed over ranks."""

import pytest
import torch

from model.balance import reset_counts, update_balance
from model.moe import MoE
from tests.model.tiny import MOE, tiny_model


def _alone(counts: torch.Tensor) -> None:
    """The sum over one rank."""


def test_bias_falls_for_the_busy_and_rises_for_the_idle() -> None:
    model = tiny_model()
    moe = model.model.layers[1].mlp
    moe.tokens_per_expert.copy_(torch.tensor([4.0, 0.0, 2.0, 2.0, 1.0, 3.0]))
    before = moe.gate.e_score_correction_bias.clone()
    counts = update_balance(model, 0.25, _alone)
    assert counts.tolist() == [[4, 0, 2, 2, 1, 3], [0] * 6]
    change = moe.gate.e_score_correction_bias - before
    torch.testing.assert_close(change, torch.tensor([-0.25, 0.25, 0.0, 0.0, 0.25, -0.25]))
    assert moe.tokens_per_expert.sum() == 0


def test_counts_of_all_layers_are_reduced_at_once() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.tokens_per_expert[0] = 1
    seen = []

    def add_another_rank(counts: torch.Tensor) -> None:
        seen.append(counts.clone())
        counts[0, 1:] += 2  # expert 0 is busy on this rank only: over both it is the idlest

    before = model.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    update_balance(model, 1.0, add_another_rank)
    assert [counts.shape for counts in seen] == [(2, 6)]
    assert (model.model.layers[1].mlp.gate.e_score_correction_bias - before).sign().tolist() == [1, -1, -1, -1, -1, -1]


def test_updates_level_the_load() -> None:
    torch.manual_seed(0)
    moe = MoE(MOE, 16, std=0.02, output_std=0.02)
    hidden = torch.randn(4, 32, 16) + torch.randn(16)  # a common direction makes some experts everybody's choice

    def imbalance() -> float:
        with torch.no_grad():
            moe(hidden)
        counts = update_balance(moe, 1e-3, _alone)
        return float(counts.max() / counts.mean())

    first, *_, last = [imbalance() for _ in range(80)]
    assert last < 1.15
    assert first > 1.5


def test_reset_forgets() -> None:
    model = tiny_model()
    model.model.layers[2].mlp.tokens_per_expert.fill_(7)
    reset_counts(model)
    assert update_balance(model, 1.0, _alone).sum() == 0


def test_a_dense_model_needs_no_exchange() -> None:
    def fail(counts: torch.Tensor) -> None:
        pytest.fail("a collective for nothing")

    assert update_balance(tiny_model(moe=None), 1.0, fail).numel() == 0
