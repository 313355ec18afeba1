"""Imports what ranks and commands need, in the server that warm processes are forked from (see `tests.warm`)."""

import launch.commands.train
import launch.local.rank
import launch.local.start
import train.run

__all__ = ["launch", "train"]
