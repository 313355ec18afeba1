"""Builds what a job's config names: its loaders and its engine."""

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Literal, cast

import torch

from model.compilation import compile_blocks
from model.transformer import Block, LanguageModel
from train.config.job import JobConfig
from train.data.batches.course import Phase
from train.data.batches.loader import Loader
from train.data.batches.reader import Source
from train.data.blend import Blend
from train.engine import Engine
from train.errors import UserError
from train.evaluation import HeldOut


def build_loader(job: JobConfig, blend: Blend, *, rank: int, world_size: int) -> Loader:
    """The batches of training for one of `world_size` ranks."""
    skip = [range(first - 1, last) for first, last in job.data.skip_steps]
    return _loader(job, blend.sources, "train", rank, world_size, skip=skip, phases=blend.phases)


def build_held_out(job: JobConfig, blend: Blend, *, rank: int, world_size: int) -> list[HeldOut]:
    """What is evaluated: of each source its validation documents, with its share of the first phase."""
    whole = sum(blend.phases[0].weights)
    return [
        HeldOut(source.name, weight / whole, _loader(job, [source], "validation", rank, world_size))
        for source, weight in zip(blend.sources, blend.phases[0].weights, strict=True)
    ]


def _loader(
    job: JobConfig,
    sources: Sequence[Source],
    split: Literal["train", "validation"],
    rank: int,
    world_size: int,
    *,
    skip: Sequence[range] = (),
    phases: Sequence[Phase] = (),
) -> Loader:
    return Loader(
        sources,
        split=split,
        skip=skip,
        phases=phases,
        sequence_length=job.data.sequence_length,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        seed=job.train.seed,
        rank=rank,
        world_size=world_size,
        validation_fraction=job.data.validation_fraction,
        best_fit=job.data.packing == "best_fit" and split == "train",
        fetch_ahead=job.data.fetch_ahead if split == "train" else 0,
        shuffle_window=job.data.shuffle_window if split == "train" else None,
    )


def build_engine(job: JobConfig, world_size: int) -> Engine:
    """The model under DeepSpeed, compiled if the job says so. Collective.

    Raises:
        UserError: the number of ranks or the model does not fit the `deepspeed` section, or no compiler is installed.
    """
    torch.manual_seed(job.train.seed)
    try:
        engine = Engine(
            LanguageModel(job.model, recompute=job.train.recompute),
            optimizer=job.optimizer,
            deepspeed_config=job.deepspeed,
            dtype=job.train.dtype,
            accumulation_steps=job.train.global_batch_size // world_size // job.train.micro_batch_size,
            gathered_whole=Block if job.train.compile else None,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
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
