"""How much more memory a rank's process keeps than its tensors take: for `launch.calibrate.machine`."""

import ctypes
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from launch.plan.memory.activations import activations
from model.config import ModelConfig
from model.transformer import LanguageModel
from train.config.deepspeed import DeepSpeedConfig
from train.memory import memory_use
from train.optim.optimizer import OptimizerConfig
from train.ranks import join_ranks

_SEQUENCES, _LENGTH, _STEPS = 16, 128, 4
_WIDTHS = ((128, 384), (384, 1024))


def memory_kept(environment: Mapping[str, str], micro_batches: int) -> dict[str, float]:
    """What a rank with these variables, the only one, keeps of steps of so many micro-batches: `hardware.Kept`."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_put_growths, args=(micro_batches, results), daemon=True)
    before = dict(os.environ)
    os.environ.update(environment)  # the C library reads its variables as the process starts
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process.join()
    if results.empty():
        raise RuntimeError("the process whose memory is measured ended early")
    return kept_of(results.get())


def kept_of(growths: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The line through two points, of what tensors take and by how much more than that a process has grown."""
    (narrow, less), (wide, more) = growths
    share = max(0.0, (more - less) / (wide - narrow))
    return {"bytes": max(0.0, more - share * wide), "share": share}


def _put_growths(micro_batches: int, results: Any) -> None:
    torch.set_num_threads(1)
    join_ranks()
    engines = []  # kept: the next one's memory shall be its own
    growths = []
    for hidden, inner in _WIDTHS:
        config = ModelConfig(vocab_size=4096, hidden_size=hidden, num_layers=3, dense_hidden_size=inner)
        engines.append(_engine(config, micro_batches))
        gradients = 4 * sum(parameter.numel() for parameter in engines[-1].module.parameters())
        buffers = gradients * (2 if micro_batches > 1 else 1)  # added up, and in the bucket
        taken = buffers + activations(config, _SEQUENCES * _LENGTH, 4, on_cpu=True).peak(recompute=False)
        growths.append((taken, _growth(engines[-1], config) - taken))
    results.put(growths)
    dist.destroy_process_group()


def _engine(config: ModelConfig, micro_batches: int) -> Any:
    from train.engine import Engine

    return Engine(
        LanguageModel(config),
        optimizer=OptimizerConfig(),
        deepspeed_config=DeepSpeedConfig(),
        accumulation_steps=micro_batches,
    )


def _growth(engine: Any, config: ModelConfig) -> float:
    """Bytes of the process, by some steps."""
    _step(engine, config, 1, 2)  # what is loaded and allocated once is part of any process
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    before = memory_use(engine.device).host
    for _ in range(_STEPS):
        _step(engine, config, _SEQUENCES, _LENGTH)
    return memory_use(engine.device).host - before


def _step(engine: Any, config: ModelConfig, sequences: int, length: int) -> None:
    for _ in range(engine.accumulation_steps):
        tokens_BT = torch.randint(config.vocab_size, (sequences, length))
        loss = engine(tokens_BT, torch.arange(length).expand(sequences, length), (), tokens_BT)
        engine.backward(loss / tokens_BT.numel())
    engine.gradient_norm_squared()
    engine.step(lr_factor=1.0)
