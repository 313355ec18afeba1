"""What a run begins with, and whether its disk has room for what it will save."""

import shutil
from pathlib import Path

from train.checkpoint.listing import checkpoints_in, find_checkpoint
from train.config.job import JobConfig
from train.errors import UserError


def choose_origin(job: JobConfig, checkpoints: Path) -> Path | None:
    """The checkpoint of another run that this one begins with, if any; what it has itself goes first.

    Args:
        job: its config.
        checkpoints: the folder of its checkpoints.

    Raises:
        UserError: `checkpoint.resume` does not go with what is there, or `checkpoint.init_from` names no checkpoint.
    """
    there, resume = checkpoints_in(checkpoints), job.checkpoint.resume
    if resume == "never" and there:
        raise UserError(
            f"checkpoint.resume is never, but {there[-1].path} exists: choose another run.name, or delete "
            f"{checkpoints.parent}"
        )
    if resume == "must" and not there:
        raise UserError(f"checkpoint.resume is must, but {checkpoints} holds no checkpoint")
    source = job.checkpoint.init_from
    return find_checkpoint(source, "checkpoint.init_from") if source and not there else None


def require_disk(job: JobConfig, checkpoints: Path, checkpoint_bytes: int) -> None:
    """Raises UserError unless the disk has room for the checkpoints that the run will keep.

    Args:
        job: its config.
        checkpoints: the folder of its checkpoints; the one above it exists.
        checkpoint_bytes: of one checkpoint, at most.
    """
    if job.checkpoint.every is None:
        return
    # The newest one is complete before the oldest goes.
    most = job.checkpoint.keep + 1 + bool(job.checkpoint.incremental)
    needed = checkpoint_bytes * max(1, most - len(checkpoints_in(checkpoints)))
    free = shutil.disk_usage(checkpoints.parent).free
    if needed > free:
        raise UserError(
            f"{checkpoints.parent}: a checkpoint takes up to {checkpoint_bytes / 1e9:.1f} GB with every table row "
            f"touched, those to come up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: set run.dir to a "
            "larger disk, or lower checkpoint.keep or model.engram.rows_per_head"
        )
