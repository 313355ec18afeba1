"""Openings of gates, counted in training."""

from types import SimpleNamespace

import pytest
import torch

from kernels.gather import row_index
from model.engram import MemoryRows
from model.transformer import LanguageModel
from tests.model.tiny import ENGRAM, positions, random_tokens, tiny_config
from train.report import gates
from train.report.gates import Gates


def test_gates_are_those_that_training_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(gates, "dist", SimpleNamespace(all_reduce=lambda counts: counts.mul_(2)))
    config = tiny_config(engram=ENGRAM.model_copy(update={"layers": [0, 2]}))
    model = LanguageModel(config, recompute=True)
    engrams = [model.model.layers[layer].engram for layer in (0, 2)]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for number, engram in enumerate(engrams):
        engram.register_forward_hook(
            lambda module, inputs, _, number=number: found[number].append(module.openings(*inputs[:2]))
        )
    counted = Gates(model, torch.device("cpu"))
    rows = torch.randn(100, config.engram.row_dim)  # type: ignore[union-attr]
    lookups = torch.randint(100, (64 * config.engram.lookups_per_token,))  # type: ignore[union-attr]
    index = row_index(lookups, 100)
    memory = [MemoryRows(rows[index.rows_V].requires_grad_(), index.compact)] * 2
    tokens = random_tokens(2, 32, seed=1)
    for _ in range(2):
        model(tokens, positions(20, 12, batch=2), memory, tokens).sum().backward()
    with torch.no_grad():
        model(tokens, positions(20, 12, batch=2), memory, tokens)
    told = counted.take()
    for number, layer in enumerate((0, 2)):
        opening = found[number][0]
        assert told[f"gate.{layer}.mean"] == pytest.approx(float(opening.mean()), abs=1e-5)
        assert told[f"gate.{layer}.open"] == pytest.approx(float((opening > 0.5).double().mean()))
        # Two steps, whose blocks are computed twice; the evaluation does not count.
        assert int(engrams[number].opened[0]) == 4 * opening.numel()
    counted.restart()
    assert counted.take() == {}
