"""Bytes of a plan of a published model: `python -m tests.offload.plan.plan_size [CONFIG] [RANKS]`.

A real plan of one rank's micro-batches, at full size, but of drawn tokens: independent ones, the k-th most frequent as
often as 1 / k. Text repeats its n-grams more often, so it has fewer unique rows.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from offload.plan.finders import HostFinder
from offload.plan.plan import Plan, Tokens, make_plan
from offload.plan.sharding import Sharding
from train.config.file import load
from train.config.job import JobConfig

CONFIG = Path(__file__).parents[3] / "configs/paper/engram-27b.yaml"


def index_bytes(plan: Plan) -> int:
    """Of the memory that the micro-batches' indices keep, whatever of it they show."""
    tensors = [
        part for module in plan.modules for index in module.indices for part in index if isinstance(part, Tensor)
    ]
    return sum({part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors}.values())


def bus_bytes(plan: Plan) -> dict[str, int]:
    """What each planner gives the bus of such a step, to the device and back, beside the rows' places."""
    tokens = sum(batch.tokens_BT.numel() for batch in plan.batches)
    # int64 ids and positions go; unique rows come back in int32, as those of tables below 2^31 rows do.
    return {"cpu": sum(part.nbytes for part in plan.tensors), "device": 16 * tokens + 4 * len(plan.rows_O)}


def plan_of(config: Path, ranks: int) -> Plan:
    """One rank's step, planned as if it were alone: indices do not depend on who owns the rows."""
    job = load(str(config), [], JobConfig)
    engram, train = job.model.engram, job.train
    assert engram is not None
    batches, length = train.global_batch_size // ranks // train.micro_batch_size, job.data.sequence_length
    frequency = 1 / np.arange(1, job.model.vocab_size + 1)
    drawn = np.random.default_rng(0).choice(
        job.model.vocab_size, (batches, train.micro_batch_size, length), p=frequency / frequency.sum()
    )
    positions_BT = torch.arange(length).expand(train.micro_batch_size, length)
    book = AddressBook(
        identity_vocabulary(job.model.vocab_size, pad_id=engram.pad_id or 0),
        layers=engram.layers,
        orders=engram.orders,
        heads=engram.heads,
        rows_per_head=engram.rows_per_head,
        seed=engram.seed,
    )
    sharding = Sharding(tuple(book.num_rows(module) for module in range(book.num_modules)), 1)
    batches = [Tokens(torch.from_numpy(each), positions_BT) for each in drawn]
    return make_plan(batches, HostFinder(book), sharding, 0, None)


def main() -> None:
    config, ranks = Path(sys.argv[1]) if sys.argv[1:] else CONFIG, int(sys.argv[2]) if sys.argv[2:] else 8
    plan = plan_of(config, ranks)
    lookups = sum(index.segment_N.numel() for module in plan.modules for index in module.indices)
    read = sum(index.rows_V.numel() for module in plan.modules for index in module.indices)
    rows, batches = len(plan.rows_O), len(plan.batches)
    print(f"{config.stem}, one of {ranks} ranks: {batches} micro-batches, {lookups:,} lookups of {rows:,} unique rows")
    print(f"rows read, counted in each micro-batch: {read:,}")
    print(f"indices: {index_bytes(plan) / 1e6:,.0f} MB")
    print(
        *(f"over the bus, planner={name}: {count / 1e6:,.1f} MB" for name, count in bus_bytes(plan).items()), sep="\n"
    )
    print(f"with a start for each unique row in each micro-batch: {(8 * lookups + 4 * batches * rows) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
