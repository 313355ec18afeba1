"""What vLLM's plugin refuses, without vLLM: tests/serve/test_vllm.py has vLLM itself tell one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.vllm_engram.refusals import first_refusal


def settings(**changed: Any) -> SimpleNamespace:
    """Those of a server that is started as docs/serve.md has it."""
    told: dict[str, dict[str, Any]] = {
        "model_config": {
            "enable_prompt_embeds": False, "dtype": torch.float32, "quantization": None, "enforce_eager": False,
        },
        "parallel_config": {
            "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1, "tensor_parallel_size": 1,
            "data_parallel_size": 1, "enable_expert_parallel": False,
        },
        "cache_config": {"kv_offloading_size": None, "cache_dtype": "auto"},
    }  # fmt: skip
    for section in told.values():
        section.update({key: changed.pop(key) for key in list(changed) if key in section})
    parts = {name: SimpleNamespace(**section) for name, section in told.items()}
    return SimpleNamespace(**{"kv_transfer_config": None, **changed}, **parts)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds: n-grams are made of token ids"),
        ({"dtype": torch.float16}, "--dtype float16: "),
        ({"quantization": "fp8"}, "--quantization was never tried"),
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype was never tried"),
        ({"decode_context_parallel_size": 2}, "context parallelism would part a request"),
        ({"prefill_context_parallel_size": 2}, "context parallelism would part a request"),
        (
            {"tensor_parallel_size": 2},
            "--tensor-parallel-size, --data-parallel-size and --enable-expert-parallel were ",
        ),
        ({"data_parallel_size": 2}, "--tensor-parallel-size, --data-parallel-size and --enable-expert-parallel were "),
        (
            {"enable_expert_parallel": True},
            "--tensor-parallel-size, --data-parallel-size and --enable-expert-parallel ",
        ),
        ({"kv_transfer_config": {}}, "--kv-transfer-config and --kv-offloading-size may leave behind"),
        ({"kv_offloading_size": 4.0}, "--kv-transfer-config and --kv-offloading-size may leave behind"),
    ],
    ids=str,
)
def test_a_setting_that_would_be_wrong_or_was_never_tried_is_refused_in_one_line(
    changed: dict[str, Any], told: str
) -> None:
    line = first_refusal(settings(**changed), on_cpu=True)
    assert line is not None
    assert line.startswith(told)
    assert "\n" not in line


def test_what_was_tried_is_not_refused() -> None:
    assert first_refusal(settings(), on_cpu=True) is None
    assert first_refusal(settings(dtype=torch.bfloat16), on_cpu=True) is None


def test_a_gpu_is_asked_for_eager_steps() -> None:
    assert "add --enforce-eager" in str(first_refusal(settings(), on_cpu=False))
    assert first_refusal(settings(enforce_eager=True), on_cpu=False) is None
