"""What a run does differently from what its config may have led one to expect."""

from collections.abc import Iterator
from typing import Protocol

from train.config.job import JobConfig


class Split(Protocol):
    """What is asked of a `train.data.loader.Loader`."""

    steps_per_epoch: int
    num_tokens: int
    num_documents: int
    validation_fraction: float


def notes(job: JobConfig, training: Split, validation: Split, world_size: int) -> Iterator[str]:
    """A line for each, to be printed at the start.

    Args:
        job: its config.
        training, validation: the two splits of its text.
        world_size: number of ranks.
    """
    epochs = job.train.steps / training.steps_per_epoch
    if epochs > 1:
        yield f"the text repeats: {job.train.steps:,} steps are {epochs:,.1f} epochs of {training.num_tokens:,} tokens"
    if not validation.num_documents:
        why = "data.validation_fraction is 0" if not validation.validation_fraction else "it takes two documents"
        yield f"no evaluation: no document is held out, as {why}"
    parts = job.train.global_batch_size // world_size // job.train.micro_batch_size
    if job.train.dtype == "bf16" and job.deepspeed.zero_optimization.stage == 0 and parts > 1:
        yield f"gradients of {parts} micro-batches are summed in bf16: deepspeed.zero_optimization.stage=1 takes fp32"
