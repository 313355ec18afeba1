"""What the real planner takes to plan a rank's step here, and how large its plans are."""

import time
from dataclasses import dataclass

import torch

from launch.plan.rows.stream import Stream
from offload.plan.finders import HostFinder
from offload.plan.plan import Tokens, make_plan
from offload.plan.sharding import Sharding

_MOST_TOKENS = 1 << 16


@dataclass(frozen=True)
class Planned:
    """A lookup's cost.

    Attributes:
        seconds: of one core of this machine, as busy as it was.
        index_bytes: bytes that the plan's indices keep.
        tokens: that were planned.
    """

    seconds: float
    index_bytes: float
    tokens: int


def measure_planning(stream: Stream, micro_batch: int, tokens_a_rank: int) -> Planned:
    """Plans a rank's first micro-batches for real, up to some ten thousand tokens, after one that does not count."""
    addresses = stream.addresses
    sharding = Sharding(tuple(addresses.num_rows(module) for module in range(addresses.num_modules)), 1)
    piece = next(iter(stream.pieces(0)))
    length = piece.tokens_BT.shape[1]
    sequences = max(1, min(len(piece.tokens_BT), min(tokens_a_rank, _MOST_TOKENS) // length))
    tokens_BT, positions_BT = piece.tokens_BT[:sequences], piece.positions_BT[:sequences]
    batches = [
        Tokens(*both) for both in zip(tokens_BT.split(micro_batch), positions_BT.split(micro_batch), strict=True)
    ]
    finder = HostFinder(addresses)
    make_plan(batches[:1], finder, sharding, 0, None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.thread_time()
    plan = make_plan(batches, finder, sharding, 0, None)
    seconds = time.thread_time() - started
    torch.set_num_threads(before)
    lookups = sum(index.segment_N.numel() for module in plan.modules for index in module.indices)
    return Planned(seconds / lookups, sum(part.nbytes for part in plan.tensors) / lookups, tokens_BT.numel())
