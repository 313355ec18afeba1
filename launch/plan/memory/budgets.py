"""Bytes of a rank's device and of a node's host memory, part by part, and whether they fit.

Arithmetic with sizes of real layouts; the sizes of a step's rows come from the replay (`launch.plan.rows.replay`).
"""

from dataclasses import dataclass

from launch.plan.cluster import Cluster
from launch.plan.memory.activations import activations
from launch.plan.memory.backbone import BackboneBytes, Matrices, backbone_bytes, count_matrices
from launch.plan.memory.processor import processor_parts
from launch.plan.memory.tables import GPU, Table, count_tables, largest_shard
from launch.plan.rows.step_rows import StepRows
from offload.engines import ENGINES, EngineFacts
from offload.optimizers import OPTIMIZERS
from offload.rows.records import RecordLayout
from train.config.job import JobConfig
from train.look_ahead import TRIED

DEVICE_USABLE, HOST_USABLE = 0.95, 0.95
"""[assumed] Of memory: fragments and what others hold take the rest."""
CONTEXT_BYTES = 2.5 * 2**30
"""[assumed] Of a device: CUDA's context, kernels, buffers of NCCL and cuBLAS."""
PROCESS_BYTES = 4 * 2**30
"""[assumed] Of the host, per rank: Python, CUDA, libraries, before any of the job."""
_STAGED_CHUNKS, _STAGED_BYTES = 8, 4 << 20  # offload/transfers/staged.py
_PLACES, _SLOT_BYTES = 4, 35  # of the directory: offload/window/directory.py, and writebacks.py
_FLOAT = 4


@dataclass(frozen=True)
class Budget:
    """Parts in bytes, and the memory that there is."""

    parts: dict[str, float]
    capacity: float

    @property
    def total(self) -> float:
        """All parts."""
        return sum(self.parts.values())

    @property
    def free(self) -> float:
        """What is left; negative if they do not fit."""
        return self.capacity - self.total


def matrices(job: JobConfig) -> Matrices:
    """The counts of the job's backbone, made once for each model and optimizer."""
    key = job.model.model_dump_json(), job.optimizer.model_dump_json()
    if key not in _memo:
        _memo[key] = count_matrices(job)
    return _memo[key]


_memo: dict[tuple[str, str], Matrices] = {}


def device_budget(job: JobConfig, cluster: Cluster, rows: StepRows | None) -> Budget:
    """Of one rank's device."""
    backbone = backbone_bytes(job, matrices(job), cluster)
    width, on_cpu = 2 if job.train.dtype == "bf16" else _FLOAT, cluster.hardware.device.is_processor
    tokens = job.train.micro_batch_size * job.data.sequence_length
    kept = activations(job.model, tokens, width, on_cpu=on_cpu).peak(job.train.recompute)
    parts = {
        "weights": backbone.weights,
        "gradients": backbone.gradients,
        "optimizer": 0.0 if backbone.optimizer_on_host else backbone.optimizer,
        "activations": kept,
        "buffers": backbone.buffers + backbone.orthogonalised,
    }
    parts |= processor_parts(job, cluster, matrices(job), backbone, kept) if on_cpu else {"cuda": CONTEXT_BYTES}
    if job.model.engram is not None and rows is not None:
        parts |= _rows_on_device(job, cluster, rows)
    return Budget(parts, DEVICE_USABLE * cluster.hardware.device.memory_bytes)


def host_budget(job: JobConfig, cluster: Cluster, rows: StepRows | None) -> Budget:
    """Of one node's host memory, every row touched."""
    backbone = backbone_bytes(job, matrices(job), cluster)
    parts = {"processes": PROCESS_BYTES, **_saved(job, cluster, backbone)}
    if backbone.optimizer_on_host:
        parts["optimizer"] = backbone.optimizer
    if job.model.engram is not None and rows is not None:
        parts |= _rows_on_host(job, cluster, rows)
    capacity = HOST_USABLE * cluster.hardware.node.memory_bytes
    return Budget({name: cluster.gpus_per_node * size for name, size in parts.items()}, capacity)


def window_slots(job: JobConfig, tables: list[Table], ranks: int) -> int:
    """Records that a rank's device holds."""
    shard = largest_shard(tables, ranks)
    return min(job.offload.window_rows, shard) if job.offload.mode == "window" else shard


def record_bytes(job: JobConfig, cluster: Cluster) -> tuple[int, int]:
    """Bytes of the weights and of a whole record, as it is in memory for such devices."""
    assert job.model.engram is not None
    layout = RecordLayout.of(job.model.engram.row_dim, job.offload.optimizer, job.offload.row_dtype)
    return 4 * layout.weight_words, layout.bytes if cluster.hardware.device.is_processor else layout.stride_bytes(GPU)


def packed_bytes(job: JobConfig) -> int:
    """Bytes of a record as it is in memory for a CPU, which is what an emulated link carries."""
    assert job.model.engram is not None
    return RecordLayout.of(job.model.engram.row_dim, job.offload.optimizer, job.offload.row_dtype).bytes


def engine_of(job: JobConfig) -> EngineFacts:
    """What carries its records over a bus; `auto` is taken for kernels both ways."""
    return ENGINES.get(job.offload.engine, ENGINES["zero_copy"])


def _rows_on_device(job: JobConfig, cluster: Cluster, rows: StepRows) -> dict[str, float]:
    assert job.model.engram is not None
    columns = _FLOAT * job.model.engram.row_dim
    tables = count_tables(job.model.engram)
    _, stride = record_bytes(job, cluster)
    optimizer = OPTIMIZERS[job.offload.optimizer.type](job.offload.optimizer)
    replayed = _FLOAT * optimizer.state_size(job.model.engram.row_dim) if optimizer.replays else 0
    exchange = rows.asked * columns if cluster.ranks > 1 else 0.0
    return {
        "window": window_slots(job, tables, cluster.ranks) * stride,
        # Values and gradients where they are used and where they are owned, what travels, and state that is replayed.
        "step_rows": 2 * columns * (rows.unique + rows.owned) + exchange + replayed * rows.owned,
        "plans": 2 * rows.index_bytes * rows.lookups + 8 * rows.owned,
        "staging": _staging_bytes(job),
    }


def _rows_on_host(job: JobConfig, cluster: Cluster, rows: StepRows) -> dict[str, float]:
    assert job.model.engram is not None
    tables = count_tables(job.model.engram)
    shard, slots = largest_shard(tables, cluster.ranks), window_slots(job, tables, cluster.ranks)
    depth = max(TRIED) if job.offload.depth == "auto" else job.offload.depth
    plans = (depth + 2) * (rows.index_bytes * rows.lookups + 8 * rows.owned)
    if job.offload.mode == "resident":
        return {"plans": plans}
    weights, stride = record_bytes(job, cluster)
    in_memory = job.offload.host_file is None
    return {
        "table_weights": shard * weights if in_memory else 0.0,
        "table_states": shard * (stride - weights) if in_memory else 0.0,
        "update_counts": shard,
        "directory": _PLACES * shard + _SLOT_BYTES * slots,
        "plans": plans,
        "staging": _staging_bytes(job),
    }


def _staging_bytes(job: JobConfig) -> int:
    return _STAGED_CHUNKS * _STAGED_BYTES if engine_of(job).stages else 0


def _saved(job: JobConfig, cluster: Cluster, backbone: BackboneBytes) -> dict[str, float]:
    if job.checkpoint.every is None or not job.checkpoint.asynchronous:
        return {}
    parts = {"saved_backbone": backbone.saved, "undo_log": 0.0}
    if job.model.engram is not None:
        shard = largest_shard(count_tables(job.model.engram), cluster.ranks)
        parts |= {"undo_log": float(job.checkpoint.undo_bytes), "saved_counts": float(shard)}
    return parts
