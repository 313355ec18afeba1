"""What is known of the transfer engines agrees with the config and with what opens them."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from offload.config import OffloadConfig
from offload.engines import ENGINES
from offload.transfers.open import pins


def test_all_engines_of_the_config_are_known() -> None:
    assert get_args(OffloadConfig.model_fields["engine"].annotation) == ("auto", *ENGINES, "cpu")


def accepted(**settings: object) -> bool:
    try:
        OffloadConfig.model_validate(settings)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("name", ENGINES)
def test_kernels_need_pinned_memory_and_alone_have_programs(name: str) -> None:
    config, facts = OffloadConfig.model_validate({"engine": name}), ENGINES[name]
    assert pins(config, torch.device("cuda")) == facts.pins
    assert accepted(engine=name, host_file="somewhere") == (not facts.pins)
    assert accepted(engine=name, programs=8) == facts.pins
    assert facts.stages == (name != "zero_copy")
