"""The loaders of a job: what it is trained on, and what is held out."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from train.config.job import JobConfig
from train.data.batches.course import Phase
from train.data.batches.loader import Loader
from train.data.batches.reader import Source
from train.data.blend import Blend


class HeldOut(NamedTuple):
    """What is evaluated of a source."""

    name: str
    share: float
    """Of the mixture: 1 without one, 0 for a source that is not read in the first phase."""
    loader: Loader
    """Of its validation documents."""


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
