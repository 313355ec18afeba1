"""Bytes that a job's rows take over the bus: `python -m tests.offload.window.bus_bytes [CONFIG] [STEPS]`.

The job's own text, plans, look-ahead and window, with the window's decisions on a thread as on a GPU. Nothing is
computed: rows have one column here and zero gradients, and each counts with the bytes of its record for a GPU.
"""

import sys
from pathlib import Path
from unittest import mock

import torch

from offload import opening
from offload.rows.records import RecordLayout, RowInit
from offload.tables import EngramTables
from offload.window.interface import Traffic
from train.config.file import load
from train.config.job import JobConfig
from train.data.batches.loader import Loader
from train.data.open import open_data
from train.tables import address_book

CONFIG = Path(__file__).parents[3] / "configs/bench.yaml"


def open_job(job: JobConfig, steps: int) -> EngramTables:
    """The tables of a job on one rank, with records of two words."""
    store = open_data(job.data)
    addresses = address_book(job.model, store)
    assert addresses is not None
    loader = Loader(
        store,
        split="train",
        sequence_length=job.data.sequence_length,
        global_batch_size=job.train.global_batch_size,
        micro_batch_size=job.train.micro_batch_size,
        seed=job.train.seed,
        rank=0,
        world_size=1,
        validation_fraction=job.data.validation_fraction,
    )
    narrow = job.offload.optimizer.model_copy(update={"type": "sgd"})
    return EngramTables(
        job.offload.model_copy(update={"optimizer": narrow, "host_touch": False}),
        addresses,
        dim=1,
        init=RowInit(job.train.seed, 0.02),
        batches=loader.batch,
        num_steps=steps,
    )


def traffic_of(opened: EngramTables, job: JobConfig, step: int, steps: int) -> Traffic:
    """What one step moves, when plans are never late."""
    for ahead in range(step, min(step + job.offload.depth + 2, steps)):
        opened._planner.request(ahead)
        opened._planner.plan(ahead)
    begun = opened.begin(step)
    begun.reduce()
    begun.apply(lr=1.0)
    return opened.take_traffic()


def told(fetched: int, drawn: int, each: int) -> str:
    """Rows, and the bytes that their records take to the window, with those that are drawn and without."""
    mine, before = (1e-6 * each * rows for rows in (fetched, fetched + drawn))
    share = 100 * drawn / max(1, fetched + drawn)
    return f"{fetched:,} fetched and {drawn:,} drawn ({share:.0f} %): {mine:,.0f} MB in instead of {before:,.0f}"


def main() -> None:
    config, steps = Path(sys.argv[1]) if sys.argv[1:] else CONFIG, int(sys.argv[2]) if sys.argv[2:] else 40
    job = load(str(config), [], JobConfig)
    assert job.model.engram is not None
    layout = RecordLayout.of(job.model.engram.row_dim, job.offload.optimizer, job.offload.row_dtype)
    each = layout.stride_bytes(torch.device("cuda"))
    print(f"{config.stem}: {each:,} bytes a record")
    with mock.patch.object(opening, "_DECIDING_BESIDE", ("cpu",)):
        opened = open_job(job, steps)
    fetched = drawn = 0
    try:
        for step in range(steps):
            moved = traffic_of(opened, job, step, steps)
            fetched, drawn = fetched + moved.fetched, drawn + moved.drawn
            rows = told(moved.fetched, moved.drawn, each)
            print(f"step {step + 1}: {moved.requested:,} rows, {moved.hits:,} hits; {rows}")
        print(f"all steps: {told(fetched, drawn, each)}")
    finally:
        opened.close()


if __name__ == "__main__":
    main()
