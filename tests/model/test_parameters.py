"""Counts against the built model, against the published totals, and what an optimizer may tell by name."""

from typing import Any

import pytest

from model.config import AttentionConfig, EngramConfig, ModelConfig, MoEConfig
from model.parameters import count_model_parameters, count_parameters, parameter_kind
from tests.model.tiny import tiny_config, tiny_model


@pytest.mark.parametrize("changes", [{}, {"moe": None}, {"engram": None}, {"tie_embeddings": True}])
def test_counts_equal_the_sum_over_parameters(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    counts = count_parameters(tiny_config(**changes))
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts == count_model_parameters(model, model.config)


def test_active_parameters_by_hand() -> None:
    moe = MoEConfig(num_experts=5, experts_per_token=2, shared_experts=0, expert_hidden_size=3)
    config = ModelConfig(vocab_size=10, hidden_size=4, num_layers=1, dense_layers=0, moe=moe)
    counts = count_parameters(config)
    one_expert = 3 * 4 * 3
    assert counts.experts == 5 * one_expert
    assert counts.embedding == counts.head == 40
    assert counts.active == counts.total - 3 * one_expert - 40


def _published(num_experts: int | None, engram: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=129_280,
        hidden_size=2560,
        num_layers=30,
        dense_hidden_size=12_288,
        attention=AttentionConfig(
            heads=32, q_lora_rank=512, kv_lora_rank=512, qk_nope_dim=128, qk_rope_dim=64, v_dim=128
        ),
        moe=MoEConfig(num_experts=num_experts, experts_per_token=6, shared_experts=2, expert_hidden_size=1536)
        if num_experts
        else None,
        engram=EngramConfig(layers=[1, 14], heads=8, row_dim=80, rows_per_head=2_262_400) if engram else None,
    )


@pytest.mark.parametrize(
    ("num_experts", "engram", "total"), [(None, False, 4.1), (72, False, 26.7), (55, True, 26.7 - 5.8)]
)
def test_published_totals(num_experts: int | None, engram: bool, total: float) -> None:
    """Engram paper, table 5, in billions; the tables hold another 5.8."""
    counts = count_parameters(_published(num_experts, engram))
    assert counts.total / 1e9 == pytest.approx(total, abs=0.05)
    assert counts.active / 1e9 == pytest.approx(3.8, abs=0.05)


def test_kinds() -> None:
    kinds: dict[str, set[str]] = {}
    for name, parameter in tiny_model().named_parameters():
        kinds.setdefault(parameter_kind(name, parameter.shape), set()).add(name)
        if parameter.dim() == 1:
            assert parameter_kind(name, parameter.shape) == "vector"
    assert kinds["embedding"] == {"model.embed_tokens.weight"}
    assert kinds["head"] == {"lm_head.weight"}
    assert kinds["router"] == {f"model.layers.{n}.mlp.gate.weight" for n in (1, 2)}
    assert "model.layers.1.engram.value_proj.weight" in kinds["matrix"]
    assert "model.layers.1.mlp.shared_experts.down_proj.weight" in kinds["matrix"]
    assert parameter_kind("model.layers.1.mlp.router.gate.weight", (6, 16)) == "router"
    assert parameter_kind("model.layers.1.mlp.experts.w1", (3, 16, 16)) == "expert"
