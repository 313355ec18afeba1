"""The bias moves against the load, by the rate, once a call, from counts summed over ranks; the loss of a sequence."""

import math

import pytest
import torch

from model.balance import reset_counts, sequence_balance, update_balance
from model.moe import MoE
from tests.model.tiny import MOE, memories, positions, random_tokens, tiny_model


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


BALANCED = MOE.model_copy(update={"sequence_balance_factor": 0.03})


def test_balance_of_a_sequence_is_the_reports_formula() -> None:
    torch.manual_seed(1)
    moe = MoE(MOE, 16, std=0.5, output_std=0.02).double()
    moe.gate.e_score_correction_bias.normal_(std=0.3)
    hidden = torch.randn(3, 5, 16, dtype=torch.float64)
    experts, chosen = MOE.num_experts, MOE.experts_per_token
    expected = []
    for sequence in hidden:
        count, share = [0.0] * experts, [0.0] * experts
        for token in sequence:
            scores = [1 / (1 + math.exp(-(weight @ token).item())) for weight in moe.gate.weight]
            biased = [s + float(b) for s, b in zip(scores, moe.gate.e_score_correction_bias, strict=True)]
            for expert in sorted(range(experts), key=lambda e: -biased[e])[:chosen]:
                count[expert] += 1
            for expert in range(experts):
                share[expert] += scores[expert] / sum(scores)
        loads = [experts / (chosen * len(sequence)) * c for c in count]
        expected.append(sum(load * s / len(sequence) for load, s in zip(loads, share, strict=True)))
    torch.testing.assert_close(sequence_balance(moe, hidden, chosen), torch.tensor(expected, dtype=torch.float64))


def test_balance_is_in_the_gradient_but_not_in_the_loss() -> None:
    """Its weight is that of a term of the mean over labels, whatever share of the labels a sequence has."""
    plain, balanced = tiny_model(torch.float64), tiny_model(torch.float64, moe=BALANCED)
    tokens, place = random_tokens(2, 12), positions(5, 7, batch=2)
    labels = tokens.roll(-1, 1)
    labels[0, 3:] = -100
    losses, gradients, inputs = [], [], {}
    for model in (plain, balanced):
        for layer in (1, 2) if model is plain else ():
            norm = model.model.layers[layer].post_attention_layernorm
            norm.register_forward_hook(lambda _, __, output, layer=layer: inputs.update({layer: output}))
        loss = model(tokens, place, memories(model, 2, 12, torch.float64), labels)
        losses.append(loss.item())
        if model is plain:
            for layer, hidden in inputs.items():
                per_sequence = sequence_balance(model.model.layers[layer].mlp, hidden, MOE.experts_per_token)
                loss = loss + 0.03 * (3 * per_sequence[0] + 12 * per_sequence[1])
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_its_gradient_levels_the_load_of_a_sequence() -> None:
    torch.manual_seed(0)
    moe = MoE(MOE, 16, std=0.02, output_std=0.02)
    hidden = torch.randn(2, 64, 16) + 2 * torch.randn(16)
    optimizer = torch.optim.SGD(moe.gate.parameters(), lr=0.3)
    values = []
    for _ in range(150):
        loss = sequence_balance(moe, hidden, MOE.experts_per_token).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item() / 2)
    assert values[0] > 1.02
    assert values[-1] < 1 + (values[0] - 1) / 3
