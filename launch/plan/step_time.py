"""How long a step takes, part by part: the cost model of `engram plan`. All of it is arithmetic; nothing is measured.

    compute    operations of the model (`model.flops`; a third more with recompute) at the rate of hardware.yaml for its
               columns
    launches   operations given to the GPU (`launch.plan.launches`) times the host's time for one; the larger of the two
               counts, as the host gives work while the GPU computes (on a processor, which computes itself, the sum)
    reduce     gradients over all ranks: at stages 0 and 1 once, at 2 and 3 with each micro-batch; at 3 all parameters
               are gathered for each forward and each backward, at 1 and 2 once after the update
    experts    with expert_parallel, each MoE layer's tokens to their experts and back, forward and backward
    optimizer  bytes of the backbone's update over the memory's rate, and Muon's products
    exchange   values of rows from their owners, gradients back
    rows       the row optimizer's reads and updates, at the busiest owner
    interference  what copies of rows take from the model's speed while they run beside it
    threads    on a processor with fewer than two cores a rank: what the threads beside the loop take of its core

Collectives are counted as if no part of them overlapped the computation, which DeepSpeed's overlap may improve on. Rows
travel beside the step: `launch.plan.stall`.
"""

import math
from dataclasses import dataclass

from launch.plan.cluster import Cluster
from launch.plan.launches import launch_count
from launch.plan.memory.backbone import Matrices
from launch.plan.memory.budgets import engine_of, packed_bytes, record_bytes
from launch.plan.rows.step_rows import StepRows
from launch.plan.stall import Stages
from model.flops import Flops
from train.config.job import JobConfig

_COLUMNS = 80  # of the rows that hardware.yaml's times are for
_FLOAT = 4


@dataclass(frozen=True)
class Moved:
    """Rows per step that cross the bus of the busiest rank, and what planning costs it.

    Attributes:
        fetched, written: rows.
        plan_seconds: to plan a step.
        room: slots that a step leaves to others, as a multiple of those that it fills.
    """

    fetched: float = 0.0
    written: float = 0.0
    plan_seconds: float = 0.0
    room: float = math.inf


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step's parts, one after another, and of its stages beside them."""

    parts: dict[str, float]
    compute: float
    launches: float
    stages: Stages

    @property
    def seconds(self) -> float:
        """Without waiting for rows."""
        return sum(self.parts.values())


def step_time(
    job: JobConfig, cluster: Cluster, flops: Flops, counted: Matrices, rows: StepRows | None, moved: Moved
) -> StepTime:
    """Computes the parts."""
    hardware, micro_batches = cluster.hardware, micro_batch_count(job, cluster)
    tokens = job.train.micro_batch_size * job.data.sequence_length
    again = 4 / 3 if job.train.recompute else 1.0
    compute = micro_batches * tokens * flops.total * again / cluster.flops_per_second(counted.columns)
    launches = micro_batches * launch_count(job.model, tokens) * again * hardware.host.launch_seconds
    parts = {
        "model": max(compute, launches) if hardware.device.overlaps_launches else compute + launches,
        "reduce": _reduce(job, cluster, counted, micro_batches),
        "experts": _experts(job, cluster, micro_batches * tokens),
        "optimizer": _optimizer(job, cluster, counted),
    }
    stages = Stages(0.0, 0.0, 0.0, 0.0, 0.0)
    if rows is not None and job.model.engram is not None:
        fetch, write = copy_seconds(job, cluster, moved)
        parts |= {"exchange": exchange_seconds(job, cluster, rows), "rows": _rows(job, cluster, rows)}
        if job.offload.mode == "window":
            parts["interference"] = min(hardware.link.lost_to_copies * (fetch + write), parts["model"])
            decide, disk = rows.owned * hardware.host.decide_seconds, disk_seconds(job, cluster, moved)
            in_loop = hardware.device.is_processor
            room = moved.room if in_loop else None
            stages = Stages(0.0, moved.plan_seconds, decide, max(fetch, disk), max(write, disk), room)
            if in_loop:
                beside = moved.plan_seconds + decide + _copying_seconds(job, cluster, moved)
                parts["threads"] = _waiting_for_cores(sum(parts.values()), beside, cluster)
        else:
            stages = Stages(0.0, moved.plan_seconds, 0.0, 0.0, 0.0)
    whole = sum(parts.values())
    return StepTime(parts, compute, launches, Stages(whole, *list(vars(stages).values())[1:]))


def micro_batch_count(job: JobConfig, cluster: Cluster) -> int:
    """Of a step, on one rank."""
    return job.train.global_batch_size // (cluster.ranks * job.train.micro_batch_size)


def copy_seconds(job: JobConfig, cluster: Cluster, moved: Moved) -> tuple[float, float]:
    """Of a step's fetch and write-back: the slower of the bus, shared by both ways, and the node's memory.

    An emulated link (`offload.emulate_link`) takes the place of the bus, each way for itself.
    """
    if (emulated := job.offload.emulate_link) is not None:
        nbytes = packed_bytes(job)
        fetch, write = (
            count * nbytes / emulated.bytes_per_second + (emulated.latency_s if count else 0.0)
            for count in (moved.fetched, moved.written)
        )
        return fetch, write
    link, node = cluster.hardware.link, cluster.hardware.node
    _, stride = record_bytes(job, cluster)
    by_kernels = engine_of(job)
    rates = link.fetch_bytes_per_second, link.write_back_bytes_per_second
    both = link.both_directions if moved.fetched and moved.written and all(by_kernels) else 1.0
    dram = node.dram_bytes_per_second / cluster.gpus_per_node
    # Staged records are read and written by the CPU, then by the copy engine: twice through memory.
    fetch, write = (
        count * stride / (min(rate * both, dram) if kernels else min(link.copy_engine_bytes_per_second, dram / 3))
        for count, rate, kernels in zip((moved.fetched, moved.written), rates, by_kernels, strict=True)
    )
    return fetch, write


def disk_seconds(job: JobConfig, cluster: Cluster, moved: Moved) -> float:
    """Of a step's reads and writes together, if the tables are in a file: a disk does so many a second for a node's
    ranks, whatever their size."""
    if job.offload.host_file is None:
        return 0.0
    return (moved.fetched + moved.written) * cluster.gpus_per_node / cluster.hardware.node.disk_records_per_second


def _copying_seconds(job: JobConfig, cluster: Cluster, moved: Moved) -> float:
    """Of a processor that moves a step's records itself."""
    link, (_, stride) = cluster.hardware.link, record_bytes(job, cluster)
    return stride * (moved.fetched / link.fetch_bytes_per_second + moved.written / link.write_back_bytes_per_second)


def _waiting_for_cores(loop: float, beside: float, cluster: Cluster) -> float:
    """What a step takes longer because `beside` seconds of threads' work share a rank's cores with the loop's."""
    cores = max(1.0, cluster.hardware.node.cores / cluster.gpus_per_node)
    return max(0.0, (loop + beside) / cores - loop)


def exchange_bytes(job: JobConfig, rows: StepRows) -> tuple[float, float]:
    """Of values and of gradients, that one rank sends in a step; to itself included."""
    assert job.model.engram is not None
    value = 2 if job.offload.exchange_dtype == "bf16" else _FLOAT
    columns = job.model.engram.row_dim
    return rows.asked * columns * value, rows.unique * columns * _FLOAT


def exchange_seconds(job: JobConfig, cluster: Cluster, rows: StepRows) -> float:
    """Of both."""
    assert job.model.engram is not None
    steps = len(job.model.engram.layers)
    return sum(cluster.exchanged(nbytes, steps=steps) for nbytes in exchange_bytes(job, rows))


def _reduce(job: JobConfig, cluster: Cluster, counted: Matrices, micro_batches: int) -> float:
    stage, expert = job.deepspeed.zero_optimization.stage, job.deepspeed.expert_parallel
    width = 2 if job.train.dtype == "bf16" else _FLOAT
    sent = 2 if job.deepspeed.communication_data_type == "bf16" else _FLOAT
    shared = counted.total - counted.experts + counted.experts / (expert.autoep_size if expert.enabled else 1)
    times = micro_batches if stage >= 2 else 1
    if not cluster.hardware.device.overlaps_launches:
        times *= 2  # gloo reduces for all ranks, of which each takes its part
    if stage == 0:
        return cluster.reduced(shared * sent)
    gathers = 2 * micro_batches if stage == 3 else 1
    return times * cluster.gathered(shared * sent) + gathers * cluster.gathered(shared * width)


def _experts(job: JobConfig, cluster: Cluster, tokens: int) -> float:
    expert, moe = job.deepspeed.expert_parallel, job.model.moe
    if moe is None or not expert.enabled or expert.autoep_size == 1:
        return 0.0
    layers = job.model.num_layers - job.model.dense_layers
    width = 2 if job.train.dtype == "bf16" else _FLOAT
    nbytes = tokens * moe.experts_per_token * job.model.hidden_size * width
    return 4 * layers * cluster.exchanged(nbytes, expert.autoep_size)


def _optimizer(job: JobConfig, cluster: Cluster, counted: Matrices) -> float:
    hardware = cluster.hardware
    held = counted.total / (cluster.ranks if job.deepspeed.zero_optimization.stage else 1)
    rate = hardware.device.memory_bytes_per_second
    if job.deepspeed.zero_optimization.offload_optimizer.device == "cpu":
        rate = hardware.node.dram_bytes_per_second / cluster.gpus_per_node
    seconds = held * hardware.backbone.optimizer_bytes / rate
    if job.optimizer.name == "muon":
        products = job.optimizer.newton_schulz_steps * counted.newton_schulz / cluster.ranks
        seconds += products / cluster.flops_per_second(counted.columns)
        seconds += 2 * cluster.exchanged(counted.muon / cluster.ranks * _FLOAT)
    return seconds + hardware.backbone.optimizer_launches * hardware.host.launch_seconds


def _rows(job: JobConfig, cluster: Cluster, rows: StepRows) -> float:
    assert job.model.engram is not None
    each = cluster.hardware.rows
    return rows.owned * (each.read_seconds + each.update_seconds) * job.model.engram.row_dim / _COLUMNS
