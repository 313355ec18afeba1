"""What a checkpoint of a job comes to for a rank, every row touched: bytes on the disk, and memory meanwhile."""

import math
from dataclasses import dataclass

from launch.plan.cluster import Cluster
from launch.plan.memory.backbone import backbone_bytes
from launch.plan.memory.budgets import matrices, packed_bytes
from launch.plan.memory.tables import count_tables, largest_shard
from train.checkpoint.index import Range, RowRange
from train.checkpoint.parts import FILE_BYTES, PIECE_BYTES
from train.checkpoint.piece_list import stored_bytes
from train.config.job import JobConfig

_ID_BYTES, _COUNT_BYTES = 8, 1
_FILE_ENTRY_BYTES = 420
"""[measured] Of a file, in the memory of each rank that loads: name, size and checksum as Python objects."""


@dataclass(frozen=True)
class SavedBytes:
    """Of the rank with the largest shard, where no other is named.

    Attributes:
        rows, backbone: what it writes.
        index: what every rank knows of all ranks' files while it loads, in memory.
        beside: host memory of a save beside training, besides what a synchronous one takes.
    """

    rows: int
    backbone: int
    index: int
    beside: int

    @classmethod
    def of(cls, job: JobConfig, cluster: Cluster) -> "SavedBytes":
        """A checkpoint of all rows."""
        backbone = math.ceil(backbone_bytes(job, matrices(job), cluster).saved)
        rows, shard, undo = 0, 0, 0
        if job.model.engram is not None:
            shard, undo = largest_shard(count_tables(job.model.engram), cluster.ranks), job.checkpoint.undo_bytes
            rows = shard * (packed_bytes(job) + _ID_BYTES + _COUNT_BYTES)
        index = cluster.ranks * (
            math.ceil(rows / PIECE_BYTES) * stored_bytes(RowRange)
            + math.ceil(backbone / PIECE_BYTES) * stored_bytes(Range)
            + math.ceil((rows + backbone) / FILE_BYTES) * _FILE_ENTRY_BYTES
        )
        return cls(rows, backbone, index, backbone + undo + _COUNT_BYTES * shard)

    @property
    def written(self) -> int:
        """All bytes that the rank writes, and at the same world size reads."""
        return self.rows + self.backbone
