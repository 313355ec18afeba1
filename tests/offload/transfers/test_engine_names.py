"""What the config accepts with each transfer engine, and which of them pin the tables."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from offload.config import OffloadConfig
from offload.transfers.open import pins


def test_a_job_may_name_every_engine() -> None:
    names = ("auto", "zero_copy", "staged", "mixed", "cpu")
    assert get_args(OffloadConfig.model_fields["engine"].annotation) == names


def accepted(**settings: object) -> bool:
    try:
        OffloadConfig.model_validate(settings)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(("name", "kernels"), [("zero_copy", True), ("staged", False), ("mixed", True)])
def test_kernels_need_pinned_memory_and_alone_have_programs(name: str, kernels: bool) -> None:
    config = OffloadConfig.model_validate({"engine": name})
    assert pins(config, torch.device("cuda")) == kernels
    assert accepted(engine=name, host_file="somewhere") == (not kernels)
    assert accepted(engine=name, programs=8) == kernels
    assert not accepted(engine=name, emulate_link={"bytes_per_second": 1e9})


def test_auto_pins_if_it_can_and_the_engine_of_a_cpu_never() -> None:
    assert pins(OffloadConfig(), torch.device("cuda"))
    assert not pins(OffloadConfig(), torch.device("cpu"))
    assert not pins(OffloadConfig(host_file="somewhere"), torch.device("cuda"))
    assert accepted(host_file="somewhere")
    assert accepted(programs=8)
    assert accepted(engine="cpu", host_file="somewhere")
    assert not accepted(engine="cpu", programs=8)
