"""Builds the engine of a job."""

import os
import shutil
import sys
from typing import cast

import torch

from model.compilation import compile_blocks
from model.transformer import Block, LanguageModel
from train.config.job import JobConfig
from train.engine import Engine
from train.errors import UserError


def build_engine(job: JobConfig, world_size: int) -> Engine:
    """The model under DeepSpeed, compiled if the job says so. Collective.

    Raises:
        UserError: the number of ranks or the model does not fit the `deepspeed` section, or no compiler is installed.
    """
    torch.manual_seed(job.train.seed)
    engine = Engine(
        LanguageModel(job.model, recompute=job.train.recompute),
        optimizer=job.optimizer,
        deepspeed_config=job.deepspeed,
        dtype=job.train.dtype,
        accumulation_steps=job.train.global_batch_size // world_size // job.train.micro_batch_size,
        gathered_whole=Block if job.train.compile else None,
    )
    if job.train.compile:
        _require_compiler(engine.device)
        compile_blocks(cast(LanguageModel, engine.module))
    return engine


def _require_compiler(device: torch.device) -> None:
    # What torch.compile would look for, minutes later.
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(name) is None:
        raise UserError(
            f"train.compile needs a C++ compiler on a CPU, and there is no {name}: install it, name another in the "
            "environment variable CXX, or set train.compile=false"
        )
