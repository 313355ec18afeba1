"""Combinations that cannot work are told in one clear line."""

from typing import Any

import pytest
from pydantic import ValidationError

from model.config import EngramConfig, HyperConnectionsConfig, ModelConfig, MoEConfig
from tests.model.tiny import tiny_config


@pytest.mark.parametrize(
    ("schema", "fields", "message"),
    [
        (MoEConfig, {"num_experts": 4, "experts_per_token": 5}, "experts_per_token is 5, but there are only 4"),
        (EngramConfig, {"layers": [2, 1]}, "layers must be ascending, without duplicates and at least 0"),
        (EngramConfig, {"layers": [1, 1]}, "layers must be ascending, without duplicates and at least 0"),
        (EngramConfig, {"layers": [-1, 1]}, "layers must be ascending, without duplicates and at least 0"),
        (EngramConfig, {"orders": [0, 2]}, "orders must be ascending, without duplicates and at least 1"),
        (EngramConfig, {"gate": "plain", "init_std": 0.0}, "init_std must be above 0"),
        (ModelConfig, {"vocab_size": 9, "moe": MoEConfig(), "dense_layers": 4}, "leaves no layer for the experts"),
        (ModelConfig, {"vocab_size": 9, "engram": EngramConfig(layers=[4])}, "layer 4, but the layers are 0 to 3"),
        (HyperConnectionsConfig, {"expansion": 0}, "greater than or equal to 1"),
        (ModelConfig, {"vocab_size": "9"}, "valid integer"),
        (ModelConfig, {"vocab_size": 9, "layers": 3}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_combinations(schema: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        schema(**fields)


def test_dense_layers_do_not_matter_without_experts() -> None:
    config = ModelConfig(vocab_size=9, num_layers=1, dense_layers=1, moe=None)
    assert not config.has_experts(0)


def test_config_survives_a_round_trip() -> None:
    config = tiny_config()
    assert ModelConfig.model_validate(config.model_dump(mode="json")) == config


def test_every_field_is_documented() -> None:
    def undocumented(schema: Any) -> list[str]:
        return [name for name, field in schema.model_fields.items() if not field.description]

    schemas = (ModelConfig, MoEConfig, EngramConfig, HyperConnectionsConfig)
    assert [undocumented(schema) for schema in schemas] == [[]] * len(schemas)
