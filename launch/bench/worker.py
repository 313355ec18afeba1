"""A rank that measures one part: a fresh process in the environment of a training rank, its allocator included."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from launch.bench.options import BenchOptions
from launch.bench.parts import PARTS
from launch.local.environment import KEEP_MEMORY
from launch.local.failures import reported
from offload.errors import Unavailable
from offload.tables import WindowTooSmall
from train.errors import UserError
from train.progress import Progress


def worker_command(part: str, options: BenchOptions, result: Path) -> list[str]:
    """The command line of a rank; the first rank writes its section to `result`, as JSON."""
    without = [word for name in KEEP_MEMORY for word in ("-u", name)] if options.plain_allocator else []
    return [
        *(["env", *without] if without else []),
        sys.executable,
        "-P",
        "-m",
        "launch.bench.worker",
        part,
        json.dumps(options.to_json()),
        str(result),
    ]


def measure(part: str, options_json: str, result: str) -> None:
    """Measures as the rank that RANK and WORLD_SIZE say.

    Raises:
        UserError: the machine's memory does not suffice.
    """
    options = BenchOptions.from_json(json.loads(options_json))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, options.threads // world_size))
    if PARTS[part].has_engine:
        # DeepSpeed takes seconds to import, and no other part needs it.
        from train.ranks import join_ranks

        join_ranks()
    elif world_size > 1:
        dist.init_process_group("gloo")
    try:
        with Progress(f"{part}, {world_size} ranks" if world_size > 1 else part, active=rank == 0) as progress:
            section = PARTS[part].measure(options, progress)
    except (Unavailable, WindowTooSmall) as error:
        raise UserError(str(error)) from None
    if rank == 0:
        Path(result).write_text(json.dumps(section.to_json()), encoding="utf-8")


if __name__ == "__main__":
    os.dup2(2, 1)  # standard output is the parent's, for its answer alone
    code = reported(lambda: measure(*sys.argv[1:]))
    sys.stderr.flush()
    # Not sys.exit: it waits for threads, and for groups of ranks that may have failed.
    os._exit(code)
