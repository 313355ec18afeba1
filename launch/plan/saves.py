"""What a rank keeps in host memory beside the records of its rows."""

from dataclasses import dataclass

import torch

from launch.plan.tables import Table, largest_shard
from model.transformer import LanguageModel
from train.config.job import JobConfig
from train.optim.optimizer import assign

_FP32_BYTES = 4
_ADAM, _MUON = 3, 2  # numbers of a parameter: its weight, and two moments or one


@dataclass(frozen=True)
class BesideRecords:
    """What the largest rank keeps in host memory beside the records.

    Attributes:
        update_counts: a byte for each row of its shard, with `offload.mode=window`.
        backbone_copy: of its part of the backbone, weights and optimizer state in fp32, for saves beside training.
        undo: at most, of records as they were, while such a save is written.
    """

    update_counts: int
    backbone_copy: int
    undo: int


def beside_records(job: JobConfig, tables: list[Table], ranks: int) -> BesideRecords:
    """Counts it; the ranks are taken to share the backbone evenly."""
    checkpoint = job.checkpoint
    beside = checkpoint.asynchronous and checkpoint.every is not None
    counts = largest_shard(tables, ranks) if job.offload.mode == "window" else 0
    copy = -(-_state_numbers(job) // ranks) * _FP32_BYTES if beside else 0
    return BesideRecords(counts, copy, checkpoint.undo_bytes if beside and tables else 0)


def _state_numbers(job: JobConfig) -> int:
    """Numbers of the backbone's weights and optimizer state."""
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in LanguageModel(job.model).named_parameters()}
    kinds = assign(job.optimizer, shapes)
    return sum(torch.Size(shape).numel() * (_MUON if kinds[name].muon else _ADAM) for name, shape in shapes.items())
