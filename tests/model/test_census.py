"""Counts against the built model, by hand, and operations against those that PyTorch executes."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.census import count_model, take_census
from model.config import ModelConfig, MoEConfig
from model.flops import flops_per_token
from model.parameters import PARTS, kind_of
from tests.model.tiny import ATTENTION, memories, positions, random_tokens, tiny_config, tiny_model

CHANGES: list[dict[str, Any]] = [{}, {"moe": None}, {"engram": None}, {"tie_embeddings": True}]


@pytest.mark.parametrize("changes", CHANGES)
def test_the_parts_are_the_whole_model(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    census = take_census(tiny_config(**changes))
    assert census.total == sum(parameter.numel() for parameter in model.parameters())
    assert census == count_model(model)
    assert tuple(census.parts) == PARTS


def test_parts_by_hand() -> None:
    moe = MoEConfig(num_experts=5, experts_per_token=2, shared_experts=3, expert_hidden_size=3)
    config = ModelConfig(vocab_size=10, hidden_size=4, num_layers=3, dense_layers=1, dense_hidden_size=7, moe=moe)
    census = take_census(config)
    one_expert = 3 * 4 * 3
    assert census.parts["input_embedding"] == (40, 0, 0)
    assert census.parts["output_head"] == (40, 40, 40)
    assert census.parts["routed_experts"] == (2 * 5 * one_expert, 2 * 2 * one_expert, 2 * 2 * one_expert)
    assert census.parts["shared_experts"].total == 2 * 3 * one_expert
    assert census.parts["dense_ffn"].total == 3 * 4 * 7
    assert census.parts["routers"].total == 2 * 5 * 4
    assert census.parts["norms"][:] == (3 * (2 * 4 + config.attention.kv_lora_rank) + 4,) * 2 + (0,)
    assert census.idle_experts == 2 * 3 * one_expert
    assert census.active == census.total - census.idle_experts - 40


def test_a_tied_embedding_computes_as_the_head() -> None:
    tied = take_census(tiny_config(tie_embeddings=True))
    untied = take_census(tiny_config())
    assert tied.active == untied.active
    assert tied.total == untied.total - untied.parts["output_head"].total


def test_a_parameter_of_no_kind_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.novelty\.weight is of no kind"):
        kind_of("model.layers.0.novelty.weight")


@pytest.mark.parametrize("changes", CHANGES)
def test_operations_are_those_that_are_executed(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    batch, length = 2, 4
    positions_BT, tokens_BT = positions(length, batch=batch), random_tokens(batch, length)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(tokens_BT, positions_BT, memories(model, batch, length)).sum().backward()
    expected = flops_per_token(model.config, take_census(model.config), length)
    # PyTorch multiplies the masked half of the attention too.
    heads, layers = ATTENTION.heads, model.config.num_layers
    columns = ATTENTION.qk_nope_dim + ATTENTION.qk_rope_dim + ATTENTION.v_dim
    masked = 3 * layers * heads * columns * (length - 1)
    assert expected.attention + masked == 6 * layers * heads * columns * length
    # And it is given values with as many columns as queries.
    padded = 6 * layers * heads * (ATTENTION.qk_nope_dim + ATTENTION.qk_rope_dim - ATTENTION.v_dim) * length
    assert counter.get_total_flops() == batch * length * (expected.total + masked + padded)
