"""Imports DeepSpeed so that it starts quickly, says nothing, and needs no compiler. To be imported before all else."""

import os
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.bf16_optimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from train.backbone_optimizer import BackboneOptimizer


def _say_nothing(*_: Any, **__: Any) -> None:
    """Instead of memory figures that ZeRO 1 in bf16 prints whatever the log level, after a garbage collection each."""


# A shared-memory all-reduce for CPUs, compiled at start-up wherever there is a compiler; gloo serves as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.runtime.bf16_optimizer.see_memory_usage = _say_nothing
ZERO_SUPPORTED_OPTIMIZERS.append(BackboneOptimizer)
# DeepSpeed calls collectives by names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

__all__ = ["deepspeed"]
