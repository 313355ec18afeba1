"""The bytes that a contender's step must move at least: each thing read or written once, nothing found in a cache."""

from typing import Any

from launch.bench.measure import Contender
from launch.bench.path.baselines import BareGather, TorchEmbedding
from launch.bench.table_path import TablePath
from launch.bench.workload import DrawnSteps

_FLOAT = 4
_ADAM_PARTS = 3  # weights and two moments


def least_bytes(contender: Contender, drawn: DrawnSteps, warmup: int) -> float:
    """Mean over the steps after the first `warmup`.

    A lookup's row is written and its gradient read; a unique row is read, and its record read and written by the
    update. A row that is fetched or written back is read in one place and written in another. Dense Adam reads and
    writes all records, and writes and reads a gradient of all rows.
    """
    row = _FLOAT * drawn.workload.dim
    unique = sum(drawn.unique_counts[warmup:]) / (drawn.steps - warmup)
    read = row * (drawn.workload.lookups + unique)
    if isinstance(contender, BareGather):
        return read
    trained = read + row * drawn.workload.lookups
    if isinstance(contender, TablePath):
        traffic: list[Any] = contender.traffic[warmup:]
        moved = sum(its.fetched + its.written_back for its in traffic) / len(traffic)
        return trained + 2 * contender.tables.record_bytes * (unique + moved)
    if isinstance(contender, TorchEmbedding):
        rows = unique if contender.sparse else drawn.workload.table_rows
        return trained + 2 * _ADAM_PARTS * row * rows + (0 if contender.sparse else 2 * row * rows)
    return trained + 2 * (row + _FLOAT) * unique  # row-wise Adagrad
