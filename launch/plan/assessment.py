"""A job on machines: memory, traffic, time, cost and what to set, joined from the parts of this folder."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from launch.plan.advice import Advice, advise
from launch.plan.cluster import Cluster
from launch.plan.figures import Figures, plan
from launch.plan.memory.budgets import Budget, device_budget, host_budget, matrices, record_bytes
from launch.plan.memory.fit import Change, smallest_change
from launch.plan.memory.tables import largest_shard
from launch.plan.rows.planning import Planned, measure_planning
from launch.plan.rows.replay import replay
from launch.plan.rows.step_rows import StepRows, step_rows
from launch.plan.rows.stream import Stream, open_stream
from launch.plan.rows.traffic import Replayed
from launch.plan.stall import least_depth
from launch.plan.step_time import Moved, StepTime, exchange_bytes, step_time
from train.config.job import JobConfig

_LOOKUPS, _MOST_STEPS, _COUNTED = 1 << 27, 24, 3
"""About how many lookups a replay takes; the most steps, and how many of them count, the last ones."""


@dataclass(frozen=True)
class Assessment:
    """Everything that `engram plan` shows. `replayed` and what follows from rows are None for a job without tables.
    `early`: of the steps that were replayed, a run's first, in which rows that are new are drawn instead of fetched."""

    figures: Figures
    cluster: Cluster
    replayed: Replayed | None
    planned: Planned | None
    tokens: int
    price: float | None
    early: bool = False

    @property
    def job(self) -> JobConfig:
        """As it is configured."""
        return self.figures.job

    @cached_property
    def rows(self) -> StepRows | None:
        """Of the busiest sampled rank."""
        return None if self.replayed is None or self.planned is None else step_rows(self.replayed, self.planned)

    @cached_property
    def device(self) -> Budget:
        """One rank's device."""
        return device_budget(self.job, self.cluster, self.rows)

    @cached_property
    def host(self) -> Budget:
        """One node's host memory."""
        return host_budget(self.job, self.cluster, self.rows)

    @cached_property
    def moved(self) -> Moved:
        """Over the bus of the busiest sampled rank; where no window holds a step, all its rows each way."""
        if self.replayed is None or self.planned is None or self.job.offload.mode == "resident":
            return Moved()
        replayed = self.replayed
        lookups = replayed.lookups / self.cluster.ranks
        plan_seconds = lookups * self.planned.seconds
        slots = min(self.job.offload.window_rows, self.shard_rows)
        rooms = ((slots - owner.owned) / owner.fetched for owner in replayed.owners if owner.fetched)
        room = max(0.0, min(rooms, default=math.inf))
        if self.early:
            stored, written = replayed.most(lambda owner: owner.stored), replayed.most(lambda owner: owner.written)
            return Moved(stored, written, plan_seconds, room)
        fetched = replayed.most(lambda owner: owner.owned if owner.fetched is None else owner.fetched)
        # In the long run as many leave as enter, unless the window holds the shard.
        whole = self.job.offload.window_rows >= self.shard_rows
        return Moved(*((0.0, 0.0) if whole else (fetched, fetched)), plan_seconds, room)

    @property
    def shard_rows(self) -> int:
        """Of the largest shard."""
        return largest_shard(self.figures.tables, self.cluster.ranks)

    @cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return step_time(self.job, self.cluster, self.figures.flops, matrices(self.job), self.rows, self.moved)

    @property
    def depth(self) -> int:
        """The configured look-ahead; with `auto`, the one that the cost model would choose."""
        depth = self.job.offload.depth
        return least_depth(self.time.stages) if depth == "auto" else depth

    @property
    def seconds(self) -> float:
        """Of a step at that look-ahead."""
        return self.time.stages.period(self.depth)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.figures.step_tokens / self.seconds

    @property
    def days(self) -> float:
        """For the token budget."""
        return self.tokens / self.tokens_per_second / 86400

    @property
    def cost(self) -> float | None:
        """For the token budget, if a GPU hour has a price."""
        return None if self.price is None else self.days * 24 * self.cluster.ranks * self.price

    @cached_property
    def advice(self) -> Advice | None:
        """What look-ahead, window and engine to take."""
        if self.replayed is None or self.rows is None:
            return None
        _, stride = record_bytes(self.job, self.cluster)
        free = self.device.free + self.device.parts["window"]
        in_file = self.job.offload.host_file is not None
        return advise(self.replayed, self.time.stages, self.shard_rows, stride, free, in_file=in_file)

    def change(self, of: Callable[..., Budget], budget: Budget) -> Change | None:
        """The smallest change that makes a budget fit; None if it fits already or none does."""
        if budget.free >= 0:
            return None
        window = self.advice.window_rows if self.advice else None
        return smallest_change(
            self.job, self.cluster, lambda job, cluster: of(job, cluster, self._rows_of(job, cluster)), window
        )

    def _rows_of(self, job: JobConfig, cluster: Cluster) -> StepRows | None:
        """Of a changed job: a rank's share of lookups and rows shrinks with its share of the job."""
        if self.rows is None:
            return None
        share = self.cluster.ranks / cluster.ranks
        rows = self.rows
        return replace(
            rows,
            lookups=share * rows.lookups,
            unique=share * rows.unique,
            asked=share * rows.asked,
            owned=share * rows.owned,
        )


def assess(
    job: JobConfig,
    cluster: Cluster,
    *,
    tokens: int | None = None,
    price: float | None = None,
    zipf: float | None = None,
    counted: int | None = None,
    told: Callable[[int, int], object] = lambda step, of: None,
) -> Assessment:
    """Computes everything; the replay of a job's steps takes some seconds.

    Args:
        job, cluster: what runs where; sizes were checked (`launch.plan.bounds`).
        tokens: to train on; None: those of the config.
        price: of a GPU hour.
        zipf: exponent of drawn tokens; None: the job's own text if it is here.
        counted: of a run's first steps that are replayed, how many count, the last ones; None: late in a run.
        told: is told of the replay's progress.
    """
    figures = plan(job, cluster.ranks)
    replayed = planned = None
    if job.model.engram is not None:
        stream = open_stream(job, zipf)
        replayed = replayed_steps(job, stream, cluster.ranks, figures, told, counted or _COUNTED)
        planned = measure_planning(stream, job.train.micro_batch_size, figures.step_tokens // cluster.ranks)
    budget = figures.step_tokens * job.train.steps if tokens is None else tokens
    return Assessment(figures, cluster, replayed, planned, budget, price, early=counted is not None)


def replayed_steps(
    job: JobConfig,
    stream: Stream,
    ranks: int,
    figures: Figures,
    told: Callable[[int, int], object],
    counted: int = _COUNTED,
) -> Replayed:
    """As many steps as are quickly hashed; the last ones count."""
    assert job.model.engram is not None
    lookups = figures.step_tokens * job.model.engram.lookups_per_token * len(job.model.engram.layers)
    steps = max(_COUNTED, min(_MOST_STEPS, _LOOKUPS // lookups))
    counted = min(counted, steps - 1)
    return replay(
        stream,
        ranks,
        job.train.global_batch_size,
        job.offload.window_rows,
        steps=counted,
        warmup=steps - counted,
        tokens=figures.step_tokens,
        told=told,
    )


def bytes_a_step(found: Assessment) -> dict[str, float]:
    """Of one rank (`pcie`: each way), of one node (`dram`, `network`)."""
    assert found.rows is not None
    _, stride = record_bytes(found.job, found.cluster)
    values, gradients = exchange_bytes(found.job, found.rows)
    gpus, cluster = found.cluster.gpus_per_node, found.cluster
    return {
        "pcie_in": found.moved.fetched * stride,
        "pcie_out": found.moved.written * stride,
        "dram": gpus * (found.moved.fetched + found.moved.written) * stride,
        "exchange_values": values,
        "exchange_gradients": gradients,
        "network": gpus * cluster.to_other_nodes(values + gradients) if cluster.nodes > 1 else 0.0,
    }
