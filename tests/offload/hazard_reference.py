"""The tables as one array under torch's Adam: what every window on every number of ranks must equal.

It takes nothing from the rooms that it judges. It emulates the ranks of a job on one: gradients are added lookup by
lookup (in chunks), then micro-batch by micro-batch, then rank by rank, in that order. All rows are updated at every
step, with a zero gradient where none came; a row's record is what it was at its last use.
"""

import torch
from torch import Tensor

from kernels.records.row_init import initial_rows
from offload.config import TableOptimizerConfig
from tests.kernels.dense_adam import DenseAdam
from tests.kernels.slow_sums import chunked_sum
from tests.offload.hazard_job import DIM, SEED, Job

_WHOLE_VECTORS = 64
"""Rows are rounded up to a multiple: the last elements, which fill no vector, torch's Adam may round otherwise."""


def reference_rows(job: Job, optimizer: TableOptimizerConfig, world_size: int) -> dict[int, bytes]:
    """The updated rows after all steps, bit by bit, of a job on `world_size` ranks: weights, both moments, version."""
    assert (optimizer.type, optimizer.untouched_rows) == ("adam", "exact")
    num_rows = -(-sum(job.addresses.sizes) // _WHOLE_VECTORS) * _WHOLE_VECTORS
    table = DenseAdam(
        initial_rows(torch.arange(num_rows), DIM, seed=SEED, std=0.02),
        (optimizer.beta1, optimizer.beta2),
        optimizer.eps,
    )
    records: dict[int, bytes] = {}
    applied = 0
    for step in range(len(job.steps)):
        batches = [job.batches(step, rank, world_size) for rank in range(world_size)]
        total_RD = torch.zeros(num_rows, DIM)
        for rank in batches:
            total_RD += _rank_gradient(job, rank, table.weights.detach(), world_size) / world_size
        if step in job.skipped | job.abandoned:
            continue
        applied += 1
        table.step(total_RD * 0.5, job.learning_rates[step % len(job.learning_rates)] * optimizer.lr_factor)
        version = torch.tensor([applied], dtype=torch.int32).view(torch.float32)
        for row in {
            r for rank in batches for tokens, _ in rank for m in range(2) for r in _rows(job, tokens, m).tolist()
        }:
            records[row] = torch.cat([*(part[row] for part in table.parts()), version]).numpy().tobytes()
    return records


def _rows(job: Job, tokens: Tensor, module: int) -> Tensor:
    return job.addresses.rows(module, tokens).flatten() + sum(job.addresses.sizes[:module])


def _rank_gradient(job: Job, micro_batches: list, weights_RD: Tensor, world_size: int) -> Tensor:
    parts = []
    for tokens, _ in micro_batches:
        part_RD = torch.zeros_like(weights_RD)
        for module in range(2):
            rows = _rows(job, tokens, module)
            values_ND = weights_RD[rows].requires_grad_()
            (job.loss(values_ND, tokens, module) * world_size).backward()
            gradients: dict[int, list[Tensor]] = {}
            for row, gradient in zip(rows.tolist(), values_ND.grad, strict=True):
                gradients.setdefault(row, []).append(gradient)
            for row, row_gradients in gradients.items():
                part_RD[row] = chunked_sum(row_gradients)
        parts.append(part_RD)
    total_RD = parts[0]
    for part_RD in parts[1:]:
        total_RD = total_RD + part_RD
    return total_RD
