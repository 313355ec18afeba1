"""Which look-ahead, window and engine to take, and why."""

import math
from dataclasses import dataclass

from launch.plan.rows.traffic import DEPTHS, SNUG, Replayed
from launch.plan.stall import Stages, least_depth
from offload.engines import ENGINES


@dataclass(frozen=True)
class Advice:
    """What to set.

    Attributes:
        depth: the smallest look-ahead that waits hardly more than the best.
        window_rows: slots for it.
        mode, engine: where rows live, and what copies them.
        reason: in words.
    """

    depth: int
    window_rows: int
    mode: str
    engine: str
    reason: str


def advise(
    replayed: Replayed, stages: Stages, shard_rows: int, record_bytes: int, free_bytes: float, *, in_file: bool
) -> Advice:
    """Advises.

    Args:
        replayed: steps of the job.
        stages: of a step.
        shard_rows, record_bytes: of the largest shard.
        free_bytes: of a device, for a window or a shard.
        in_file: whether the tables are in a file, which cannot be pinned.
    """
    depth = least_depth(stages, DEPTHS)
    known = [most for owner in replayed.owners for ahead, most in owner.unions.items() if ahead <= depth]
    window = min(shard_rows, math.ceil(SNUG * max(known)))
    engine = next(name for name, facts in ENGINES.items() if not (in_file and facts.pins))
    if shard_rows * record_bytes <= free_bytes:
        why = "a rank's whole shard fits on its device: no row need travel"
        return Advice(depth, shard_rows, "resident", engine, why)
    if window >= shard_rows:
        why = "steps use nearly all of a shard, which a window would hold whole: use more devices"
        return Advice(depth, shard_rows, "resident", engine, why)
    why = "a file cannot be pinned" if in_file else "tables can be pinned, and kernels reach them"
    return Advice(depth, window, "window", engine, f"a shard does not fit beside the model; {why}")
