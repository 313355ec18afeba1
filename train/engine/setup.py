"""Imports DeepSpeed so that it starts quickly, says nothing, and needs no compiler. To be imported before all else."""

import functools
import os
import warnings
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.runtime.bf16_optimizer
import deepspeed.utils.numa
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from train.optim.backbone import BackboneOptimizer


def _import_muon() -> None:
    """Imports DeepSpeed's Muon, as DeepSpeed would, although it is not used here.

    It decorates three functions with torch.compile, and that alone loads the compiler: a second and a half per rank.
    """
    compile_ = torch.compile
    torch.compile = lambda *_, **__: lambda function: function  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compile_


def _say_nothing(*_: Any, **__: Any) -> None:
    """Replaces memory figures that ZeRO 1 in bf16 prints at any log level, each after a garbage collection."""


_import_muon()
# DeepSpeed would try the compiler for each of its operators, only to compile a shared-memory all-reduce for CPUs: with
# no operator declared possible it does neither, and gloo serves as well.
deepspeed.ops.__compatible_ops__ = {}
deepspeed.runtime.bf16_optimizer.see_memory_usage = _say_nothing
# On CPUs, ZeRO 3 asks the program numactl for the machine's nodes with every bucket of gradients.
deepspeed.utils.numa.get_numa_cores = functools.cache(deepspeed.utils.numa.get_numa_cores)
ZERO_SUPPORTED_OPTIMIZERS.append(BackboneOptimizer)
# DeepSpeed calls collectives by names that torch 2.13 deprecates.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

__all__ = ["deepspeed"]
