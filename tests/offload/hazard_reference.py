"""The tables as one array, updated step by step in plain loops: what every window on every number of ranks must equal.

It emulates the ranks of a job on one: gradients are added lookup by lookup (in chunks), then micro-batch by
micro-batch, then rank by rank, in that order.
"""

import torch
from torch import Tensor

from offload.config import TableOptimizerConfig
from offload.rows.records import RecordLayout, RowInit
from offload.rows.updater import RowUpdater
from tests.kernels.slow_sums import chunked_sum
from tests.offload.hazard_job import DIM, SEED, Job


def reference_rows(job: Job, optimizer: TableOptimizerConfig, world_size: int) -> dict[int, bytes]:
    """The updated rows after all steps, bit by bit, of a job on `world_size` ranks."""
    num_rows = sum(job.addresses.sizes)
    layout = RecordLayout.of(DIM, optimizer)
    updater = RowUpdater(optimizer, layout)
    records_RW = torch.zeros(num_rows, layout.words)
    RowInit(SEED, 0.02).fill(layout, records_RW, torch.arange(num_rows))
    for step in range(len(job.steps)):
        batches = [job.batches(step, rank, world_size) for rank in range(world_size)]
        used = torch.cat([_rows(job, tokens, m) for rank in batches for tokens, _ in rank for m in range(2)]).unique()
        current_OW = records_RW[used]
        updater.catch_up(current_OW)
        weights_RD = torch.zeros(num_rows, DIM)
        weights_RD[used] = layout.weights(current_OW)
        total_RD = torch.zeros(num_rows, DIM)
        for rank in batches:
            total_RD += _rank_gradient(job, rank, weights_RD, world_size) / world_size
        if step not in job.skipped | job.abandoned:
            updater.update(current_OW, total_RD[used] * 0.5, job.learning_rates[step % len(job.learning_rates)])
            records_RW[used] = current_OW
    updated = layout.version(records_RW).nonzero().flatten().tolist()
    return {row: records_RW[row].numpy().tobytes() for row in updated}


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
