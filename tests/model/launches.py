"""Counts what a micro-batch gives a GPU to do, without one: `python -m tests.model.launches configs/bench.yaml`.

What is counted: tests/kernels/launches.py. No size depends on what Triton's kernels would have written. What DeepSpeed
does to gradients is not in the count.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import model.loss
from kernels.gather import row_index
from model.config import ModelConfig
from model.engram import MemoryRows
from model.transformer import LanguageModel
from tests.kernels.launches import on_a_gpu

_TOKENS = 128
"""Of the counted micro-batch: FlexAttention's least."""
_ROWS, _COLUMNS, _VOCABULARY = 40, 16, 256


def launches(config: ModelConfig, tokens: int) -> Counter[str]:
    """What a bf16 micro-batch launches, forward and backward, by name; its gradients are added to earlier ones.

    Args:
        config: all of its structure counts; the widths are made small.
        tokens: of a micro-batch, on which depends in how many chunks the loss is computed.
    """
    torch.manual_seed(0)
    network = LanguageModel(narrow(config)).to(torch.bfloat16)
    arguments = micro_batch(config)
    with _loss_in_chunks(_chunks(config, tokens)), on_a_gpu() as counted, _flex_attention(counted):
        for _ in range(2):
            counted.clear()
            network(*arguments).backward()
    return counted


def micro_batch(config: ModelConfig) -> tuple[Tensor, Tensor, list[MemoryRows], Tensor]:
    """Small arguments of the narrow network: tokens, positions, memory and labels."""
    tokens_BT, positions_BT = torch.randint(_VOCABULARY, (1, _TOKENS)), torch.arange(_TOKENS).unsqueeze(0)
    return tokens_BT, positions_BT, _memory(config), tokens_BT


def narrow(config: ModelConfig) -> ModelConfig:
    """The same network with small widths: as many layers, branches, experts, taps and tables."""
    attention = {"heads": 2, "kv_lora_rank": 16, "qk_nope_dim": 16, "qk_rope_dim": 16, "v_dim": 16}
    if config.attention.q_lora_rank is not None:
        attention["q_lora_rank"] = 16
    changes: dict[str, Any] = {"vocab_size": _VOCABULARY, "hidden_size": 64, "dense_hidden_size": 64}
    changes["attention"] = config.attention.model_copy(update=attention)
    if config.moe is not None:
        changes["moe"] = config.moe.model_copy(update={"expert_hidden_size": 16})
    if config.engram is not None:
        changes["engram"] = config.engram.model_copy(update={"row_dim": _COLUMNS})
    return config.model_copy(update=changes)


@contextmanager
def _flex_attention(counted: Counter[str]) -> Iterator[None]:
    """Counts FlexAttention as what the compiler makes of it for a GPU."""

    class Flex(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            ctx.save_for_backward(query, key, value)
            counted["flex_attention"] += 1
            return value.new_empty(value.shape)

        @staticmethod
        def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor, ...]:
            counted["flex_attention_backward"] += 2  # the products of results and their gradients come first
            return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)

    def attention(query: Tensor, key: Tensor, value: Tensor, **_options: object) -> Tensor:
        result: Tensor = Flex.apply(query, key, value)
        return result

    with mock.patch("model.document_attention._flex_attention", return_value=attention):
        yield


def _memory(config: ModelConfig) -> list[MemoryRows]:
    if config.engram is None:
        return []
    index = row_index(torch.randint(_ROWS, (_TOKENS * config.engram.lookups_per_token,)), _ROWS)
    return [MemoryRows(torch.randn(_ROWS, _COLUMNS, requires_grad=True), index) for _ in config.engram.layers]


def _chunks(config: ModelConfig, tokens: int) -> int:
    return ceil(tokens / max(model.loss._LEAST_TOKENS, model.loss._GPU_CHUNK // config.vocab_size))


@contextmanager
def _loss_in_chunks(chunks: int) -> Iterator[None]:
    with (
        mock.patch.object(model.loss, "_LEAST_TOKENS", 1),
        mock.patch.object(model.loss, "_GPU_CHUNK", ceil(_TOKENS / chunks) * _VOCABULARY),
    ):
        yield


def _main(paths: list[str]) -> None:
    from train.config.file import load
    from train.config.job import JobConfig

    for path in paths:
        job = load(path, [], JobConfig)
        counted = launches(job.model, job.train.micro_batch_size * job.data.sequence_length)
        own = sum(count for name, count in counted.items() if name.startswith("triton::"))
        print(f"{path}: {counted.total()} a micro-batch, {own} of them kernels of the project's own")
        for name, count in counted.most_common():
            print(f"{count:7} {name}")


if __name__ == "__main__":
    _main(sys.argv[1:])
