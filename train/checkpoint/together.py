"""What all ranks do together: it succeeds on all of them, or fails on all of them with the same words."""

import os
import platform
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from train.checkpoint.checked import Damaged
from train.errors import UserError

SHARE = "set run.dir to a folder on a disk that all nodes share, or run.local_checkpoints=true if there is none"
"""What to do about ranks that see different files."""

T = TypeVar("T")


class Failed(UserError):
    """A rank could not do its part; the message says what went wrong, and on which rank."""


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """Runs `action` on every rank; returns what each returned, in rank order. Collective, over `group` of all ranks.

    Raises:
        Failed: on all ranks, if `action` raised OSError, Damaged or UserError on one of them.
    """
    result, error = None, None
    try:
        result = action()
    except UserError as raised:
        error = str(raised)
    except (OSError, Damaged) as raised:
        error = f"rank {dist.get_rank()} on {platform.node()}: {_told(raised)}"
    everyone: list[tuple[T, str | None]] = [None] * dist.get_world_size()  # type: ignore[list-item]
    dist.all_gather_object(everyone, (result, error), group)
    if errors := [error for _, error in everyone if error]:
        raise Failed(errors[0])
    return [result for result, _ in everyone]


def on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `action` on rank 0 alone; all ranks get what it returned. Collective, over `group` of all ranks.

    Raises:
        Failed: on all ranks, if it raised OSError, Damaged or UserError.
    """
    return together(lambda: action() if dist.get_rank() == 0 else None, group)[0]  # type: ignore[return-value]


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return place + (error.strerror or os.strerror(error.errno or 0)).lower()
    return str(error)
