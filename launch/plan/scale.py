"""How a job's rows change as its number of ranks grows, with the batch as it is and with one that grows with them.

For every world size the real addresses and directories are replayed on the job's tokens (`launch.plan.rows`), and the
cost model says how long a step takes, with the shards on the devices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.plan.cluster import Cluster
from launch.plan.figures import Figures, plan
from launch.plan.hardware import Hardware, Network
from launch.plan.memory.backbone import Matrices, count_matrices
from launch.plan.memory.budgets import device_budget, record_bytes
from launch.plan.memory.tables import largest_shard
from launch.plan.rows.planning import Planned, measure_planning
from launch.plan.rows.replay import replay
from launch.plan.rows.step_rows import step_rows
from launch.plan.rows.stream import open_stream
from launch.plan.step_time import Moved, exchange_bytes, step_time
from train.config.job import JobConfig

_WARMUP, _COUNTED = 1, 1


@dataclass(frozen=True)
class Point:
    """One world size, per step. Rows and bytes are of the busiest sampled rank, unless named otherwise.

    Attributes:
        batch: `fixed` or `growing`.
        ranks, sequences, tokens: of the job.
        shard_rows, shard_bytes: of a rank; what it would take on the device.
        owned, owned_mean, asked: rows of its shard that the step uses, their mean, and rows that ranks request from it.
        used: share of the shard's rows that the step uses.
        hit_rate: in a window that holds a quarter more than a step.
        imbalance: the busiest sampled owner over the mean.
        exchange_bytes, node_bytes: values and gradients that a rank sends, and that leave a node.
        plan_seconds: of a rank's core.
        step_seconds, exchange_seconds, device_free: by the cost model; free with the shard resident.
        thinned: one row in this many was sampled.
        stream: where the tokens come from.
    """

    batch: str
    ranks: int
    sequences: int
    tokens: int
    shard_rows: int
    shard_bytes: int
    owned: float
    owned_mean: float
    asked: float
    used: float
    hit_rate: float
    imbalance: float
    exchange_bytes: float
    node_bytes: float
    plan_seconds: float
    step_seconds: float
    exchange_seconds: float
    device_free: float
    thinned: int
    stream: str

    def to_json(self) -> dict[str, Any]:
        """The point as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Machines:
    """What a world is built of: a rank is a GPU, and a node has up to `gpus_per_node`."""

    hardware: Hardware
    network: Network
    gpus_per_node: int

    def cluster(self, ranks: int) -> Cluster:
        """That many ranks on as few nodes as hold them."""
        here = min(ranks, self.gpus_per_node)
        return Cluster(ranks // here, here, self.hardware, self.network)


@dataclass(frozen=True)
class Scaled:
    """What stays the same over all worlds.

    Args:
        figures, counted: of the job.
        planned: what a lookup costs to plan.
        machines: of each world.
        zipf: exponent of drawn tokens; None: the job's own text if it is here.
        growing: sequences per rank of the batch that grows.
    """

    figures: Figures
    counted: Matrices
    planned: Planned
    machines: Machines
    zipf: float | None
    growing: int

    def points(self, worlds: Sequence[int], told: Callable[[str], object] = lambda text: None) -> Iterator[Point]:
        """One point per world and batch, as each is done; worlds that a batch does not divide over are left out."""
        for batch in ("fixed", "growing"):
            for ranks in worlds:
                sequences = self.figures.job.train.global_batch_size if batch == "fixed" else self.growing * ranks
                if sequences % ranks == 0:
                    told(f"{batch} batch of {sequences:,} sequences, {ranks:,} ranks")
                    yield self._point(batch, ranks, sequences)

    def _point(self, batch: str, ranks: int, sequences: int) -> Point:
        job = _with_batch(self.figures.job, sequences, ranks)
        shard, tokens = largest_shard(self.figures.tables, ranks), sequences * job.data.sequence_length
        replayed = replay(
            open_stream(job, self.zipf), ranks, sequences, None, steps=_COUNTED, warmup=_WARMUP, tokens=tokens
        )
        rows = step_rows(replayed, self.planned)
        cluster = self.machines.cluster(ranks)
        _, stride = record_bytes(job, cluster)
        resident = job.model_copy(update={"offload": job.offload.model_copy(update={"mode": "resident"})})
        plan_seconds = rows.lookups * self.planned.seconds
        found = step_time(resident, cluster, self.figures.flops, self.counted, rows, Moved(0, 0, plan_seconds))
        hits = [owner.hit_rate for owner in replayed.owners if owner.hit_rate is not None]
        sent = sum(exchange_bytes(job, rows))
        return Point(
            batch,
            ranks,
            sequences,
            tokens,
            shard,
            shard * stride,
            rows.owned,
            replayed.mean(lambda owner: owner.owned),
            rows.asked,
            rows.owned / shard,
            min(hits),
            replayed.imbalance,
            sent,
            cluster.gpus_per_node * cluster.to_other_nodes(sent) if cluster.nodes > 1 else 0.0,
            plan_seconds,
            found.stages.period(1),
            found.parts["exchange"],
            device_budget(resident, cluster, rows).free,
            replayed.thinned,
            replayed.stream,
        )


def scaled(job: JobConfig, machines: Machines, zipf: float | None, growing: int) -> Scaled:
    """What is the same in all worlds, computed once."""
    stream = open_stream(job, zipf)
    planned = measure_planning(stream, job.train.micro_batch_size, growing * job.data.sequence_length)
    return Scaled(plan(job, 1), count_matrices(job), planned, machines, zipf, growing)


def _with_batch(job: JobConfig, sequences: int, ranks: int) -> JobConfig:
    each = sequences // ranks
    micro = max(size for size in range(1, job.train.micro_batch_size + 1) if each % size == 0)
    train = job.train.model_copy(update={"global_batch_size": sequences, "micro_batch_size": micro})
    return job.model_copy(update={"train": train})
