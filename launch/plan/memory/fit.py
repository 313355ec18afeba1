"""The smallest single change that makes a job fit: tried one after another, each with the real sizes.

In this order: what changes no result and costs little, what costs time, what changes rounding, and more machines.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from launch.plan.cluster import MOST_NODES, Cluster
from launch.plan.hardware import Network
from launch.plan.memory.budgets import Budget
from offload.optimizers import OPTIMIZERS
from train.config.job import JobConfig

_MORE_NODES = (2, 4, 8, 16, 32, 64)
_SMALL = "rowwise_adagrad"


@dataclass(frozen=True)
class Change:
    """What to set, and what it leaves free."""

    setting: str
    free: float


def smallest_change(
    job: JobConfig, cluster: Cluster, budget: Callable[[JobConfig, Cluster], Budget], fitting_window: int | None
) -> Change | None:
    """The first change of the list under which the budget fits, or None.

    Args:
        job, cluster: as they are.
        budget: of a changed job.
        fitting_window: rows that the window needs; None without tables.
    """
    for setting, changed, others in _changes(job, cluster, fitting_window):
        if (found := budget(changed, others)).free >= 0:
            return Change(setting, found.free)
    return None


def with_settings(job: JobConfig, settings: dict[str, Any]) -> JobConfig:
    """The job with dotted keys replaced; values are as they are in the schema."""
    for key, value in settings.items():
        job = _replaced(job, key.split("."), value)
    return job


def _replaced(section: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    inner = _replaced(getattr(section, name), rest, value) if rest else value
    return section.model_copy(update={name: inner})


def _changes(job: JobConfig, cluster: Cluster, window: int | None) -> Iterator[tuple[str, JobConfig, Cluster]]:
    for settings in _settings(job, window):
        told = " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())
        yield told, with_settings(job, settings), cluster
    network = cluster.network or Network(bytes_per_second=1.0, ports="gpu", latency_seconds=0.0)
    for times in _MORE_NODES:
        nodes = cluster.nodes * times
        ranks = nodes * cluster.gpus_per_node
        if nodes > MOST_NODES or job.train.global_batch_size % (ranks * job.train.micro_batch_size):
            return
        yield f"--nodes {nodes}", job, replace(cluster, nodes=nodes, network=network)


def _settings(job: JobConfig, window: int | None) -> Iterator[dict[str, Any]]:
    if window is not None:
        yield from _fewer_slots(job, window)
    yield from _less_at_once(job)
    if job.checkpoint.asynchronous:
        yield {"checkpoint.asynchronous": False}
    if window is not None:
        yield from _smaller_records(job)


def _fewer_slots(job: JobConfig, window: int) -> Iterator[dict[str, Any]]:
    if job.offload.mode == "resident":
        yield {"offload.mode": "window", "offload.window_rows": window}
    elif window < job.offload.window_rows:
        yield {"offload.window_rows": window}


def _less_at_once(job: JobConfig) -> Iterator[dict[str, Any]]:
    zero, settings = "deepspeed.zero_optimization", job.deepspeed.zero_optimization
    micro = job.train.micro_batch_size
    while micro % 2 == 0:
        micro //= 2
        yield {"train.micro_batch_size": micro}
    for higher in range(settings.stage + 1, 4):
        yield {f"{zero}.stage": higher}
    if not job.train.recompute:
        yield {"train.recompute": True}
    if settings.stage and settings.offload_optimizer.device == "none":
        yield {f"{zero}.offload_optimizer.device": "cpu"}


def _smaller_records(job: JobConfig) -> Iterator[dict[str, Any]]:
    assert job.model.engram is not None
    dim, settings = job.model.engram.row_dim, job.offload.optimizer
    optimizer = OPTIMIZERS[settings.type]
    if settings.state_dtype == "fp32" and "bf16" in optimizer.state_dtypes:
        yield {"offload.optimizer.state_dtype": "bf16"}
    if job.offload.row_dtype == "fp32":
        yield {"offload.row_dtype": "bf16"}
    if OPTIMIZERS[_SMALL].state_size(dim) < optimizer.state_size(dim):
        yield {"offload.optimizer.type": _SMALL, "offload.optimizer.state_dtype": "fp32"}
