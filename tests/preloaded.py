"""Imports what ranks and commands need, in the server that warm processes are forked from (see `tests.warm`)."""

import gc

import torch._dynamo  # noqa: F401  what the first optimizer step imports

import launch.commands.train
import launch.local.rank
import launch.local.start
import train.run

__all__ = ["launch", "train"]

# Collections in the forked processes would visit, and so copy, all that is imported.
gc.collect()
gc.freeze()
