"""Who holds which part of which parameter: the one description that clipping, Muon and checkpoints share.

However a parameter is partitioned (ZeRO stage, expert parallelism, any number of ranks), a rank holds runs of
consecutive elements of it inside flat fp32 tensors. A parameter is known by its logical name and shape, those of the
model as it was written, so everything said in runs is independent of the partitioning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
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
    """Where they stand in the flat tensor that holds them."""


@dataclass(frozen=True)
class Shard:
    """One tensor that the optimizer updates, and what it consists of."""

    flat: Tensor
    """fp32 master weights; any shape, contiguous. Elements outside all runs are padding and stay zero."""
    runs: list[Run]
    group: dist.ProcessGroup
    """The ranks that share these parameters, split between them or replicated on each."""
    replicated: bool
    """Each rank of `group` holds all of it (ZeRO 0), not a part of its own."""


Layout = list[list[list[Run]]]
"""Runs of every rank of the world: [rank][shard][run]. Shard `i` is the same group of parameters on every rank."""


def gather_layout(shards: Sequence[Shard]) -> Layout:
    """Tells every rank what all ranks hold. Collective."""
    layout: Layout = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(layout, [shard.runs for shard in shards])
    return layout


def check_complete(layout: Layout, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises RuntimeError unless the runs of all ranks cover every parameter of `shapes` exactly, and nothing else."""
    covered = dict.fromkeys(shapes, 0)
    for run in (run for rank in owned_runs(layout) for shard in rank for run in shard):
        if shapes.get(run.name) != run.shape:
            raise RuntimeError(f"the engine holds {run.name} {run.shape}, the model has {shapes.get(run.name)}")
        covered[run.name] += run.numel
    if wrong := [name for name, numel in covered.items() if numel != prod(shapes[name])]:
        raise RuntimeError(f"the engine holds a part or a multiple of {wrong[0]} (and {len(wrong) - 1} more)")


def owned_runs(layout: Layout) -> list[list[list[Run]]]:
    """`layout` without repetitions: of equal copies of a run, the lowest rank's stays."""
    seen: set[tuple[str, tuple[int, ...], int, int]] = set()
    owned: Layout = []
    for rank in layout:
        owned.append([[run for run in shard if run[:4] not in seen] for shard in rank])
        seen.update(run[:4] for shard in rank for run in shard)
    return owned


def load_run(flat: Tensor, run: Run, whole: Tensor) -> None:
    """Copies one run of the whole parameter `whole` (any float dtype, any device) into its place in `flat`."""
    source = whole.reshape(-1)[run.start : run.start + run.numel]
    flat.view(-1)[run.offset : run.offset + run.numel].copy_(source)


@torch.no_grad()
def gather_parameters(
    values: Mapping[int, Tensor], owned: Layout, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor] | None:
    """Whole parameters, put together on rank 0 from all ranks' flat tensors; None elsewhere. Collective.

    Args:
        values: by number of shard, this rank's tensor (weights, or one kind of optimizer state) laid out as the
            shard. Every rank names the same shards.
        owned: from `owned_runs`.
        device: one that the process group communicates from.
        dtype: of all values.

    Returns:
        On rank 0, by logical name, a CPU tensor of the parameter's logical shape.
    """
    rank = dist.get_rank()
    whole: dict[str, Tensor] = {}
    for index in sorted(values):
        for source in range(len(owned)):
            runs = owned[source][index]
            if runs and rank == source:
                packed = torch.cat([values[index].view(-1)[run.offset : run.offset + run.numel] for run in runs])
                if source != 0:
                    dist.send(packed.to(device), dst=0)
            elif runs and rank == 0:
                packed = torch.empty(sum(run.numel for run in runs), dtype=dtype, device=device)
                dist.recv(packed, src=source)
            if runs and rank == 0:
                _unpack(packed, runs, whole)
    return whole if rank == 0 else None


def _unpack(packed: Tensor, runs: Sequence[Run], whole: dict[str, Tensor]) -> None:
    for run, piece in zip(runs, packed.split([run.numel for run in runs]), strict=True):
        if run.name not in whole:
            whole[run.name] = torch.empty(run.shape, dtype=packed.dtype)
        whole[run.name].view(-1)[run.start : run.start + run.numel].copy_(piece)
