"""Imports what ranks and commands need, in the server that warm processes are forked from (see `tests.warm`)."""

# ruff: noqa: E402 - the collector would visit, again and again, what is imported
import gc

gc.disable()

import threading

import torch
import torch._dynamo  # what the first optimizer step imports

import launch.commands.train
import launch.local.rank
import launch.local.start
import train.run
from kernels.gather import gather
from offload.config import OffloadConfig
from tests.offload.tables_job import Job, open_tables

__all__ = ["launch", "train"]


def _load_compiled_loops() -> None:
    """Runs the tables, so that importing Numba and loading what it compiled, half of a short rank's work, is done."""
    tables = open_tables(Job(steps=6), OffloadConfig(window_rows=100))
    for step in range(6):
        begun = tables.begin(step)
        for leaf, index in begun.rows.of(0):
            values_ND = gather(leaf.detach(), index)
            # What a backward calls: one by autograd would forbid any in forked processes.
            torch.ops.engram.gather_backward(values_ND, *index.tensors, index.num_rows, torch.float32)
        begun.reduce()
        begun.apply(lr=0.01)
    tables.close()


_load_compiled_loops()
assert threading.active_count() == 1, "what another thread holds would stay held in forked processes"
# Collections in the forked processes would visit, and so copy, all that is imported.
gc.collect()
gc.freeze()
gc.enable()
