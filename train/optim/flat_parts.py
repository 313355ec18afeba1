"""Who holds which part of which parameter: the one description that clipping, Muon and checkpoints share.

However a parameter is partitioned (ZeRO stage, expert parallelism, any number of ranks), a rank holds runs of
consecutive elements of it inside flat fp32 tensors. A parameter is known by its logical name and shape, those of the
model as it was written, so everything said in runs is independent of the partitioning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Run(NamedTuple):
    """`numel` consecutive elements of a parameter."""

    name: str
    """Logical name of the parameter."""
    shape: tuple[int, ...]
    """Logical shape of the whole parameter."""
    start: int
    """First element, in the row-major order of the parameter."""
    numel: int
    offset: int
    """Where they are in the flat tensor that holds them."""


@dataclass(frozen=True)
class FlatPart:
    """One tensor that the optimizer updates, and what it consists of."""

    flat: Tensor
    """fp32 master weights; any shape, contiguous. Elements outside all runs are padding and stay zero."""
    runs: list[Run]
    group: dist.ProcessGroup
    """The ranks that share these parameters, split between them or replicated on each."""
    replicated: bool
    """Each rank of `group` holds all of it (ZeRO 0), not a part of its own."""


Layout = list[list[list[Run]]]
"""Runs of every rank of the world: [rank][part][run]. FlatPart `i` is the same group of parameters on every rank."""


def gather_layout(parts: Sequence[FlatPart]) -> Layout:
    """Tells every rank what all ranks hold. Collective."""
    layout: Layout = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(layout, [part.runs for part in parts])
    return layout


def check_complete(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises RuntimeError unless the runs of all ranks cover every parameter of `shapes` exactly, and nothing else."""
    covered = dict.fromkeys(shapes, 0)
    for run in (run for rank in owned_runs(layout) for part in rank for run in part):
        if shapes.get(run.name) != run.shape:
            raise RuntimeError(f"the engine holds {run.name} {run.shape}, the model has {shapes.get(run.name)}")
        covered[run.name] += run.numel
    if wrong := [name for name, numel in covered.items() if numel != prod(shapes[name])]:
        raise RuntimeError(f"the engine holds a part or a multiple of {wrong[0]} (and {len(wrong) - 1} more)")


def owned_runs(layout: Layout) -> Layout:
    """`layout` without repetitions: of ranks with equal copies of a run, the one with the least so far keeps it."""
    holders: dict[tuple[Any, ...], list[int]] = {}
    for rank, parts in enumerate(layout):
        for run in (run for part in parts for run in part):
            holders.setdefault(run[:4], []).append(rank)
    loads, owner = [0] * len(layout), {}
    for key, ranks in holders.items():
        owner[key] = min(ranks, key=lambda rank: loads[rank])
        loads[owner[key]] += key[3]
    return [[[run for run in part if owner[run[:4]] == rank] for part in parts] for rank, parts in enumerate(layout)]
