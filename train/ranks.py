"""How the processes of a job become its ranks."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from train.errors import UserError


def join_ranks(timeout_s: float | None = None) -> torch.device:
    """Initialises torch.distributed from the environment; returns where this rank computes. Collective.

    `timeout_s` is how long ranks wait for each other, here and in each exchange; None: PyTorch's default.

    Raises:
        UserError: the ranks do not find each other, or this one has no GPU of its own.
    """
    # DeepSpeed decides by it too: one place says where the job runs.
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if on_gpu:
        torch.cuda.set_device(_own_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_patience(timeout_s))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find the others at {place} (MASTER_ADDR, "
            f"MASTER_PORT): {str(error).splitlines()[0]}; check that all ranks run, and that this port is open between "
            "their hosts"
        ) from None
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def join_on_hosts() -> None:
    """Initialises torch.distributed for ranks that each have a whole model, and exchange a few objects in host memory.

    One may wait long for another, which has longer texts. Collective.
    """
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        torch.cuda.set_device(_own_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
    dist.init_process_group("gloo", timeout=timedelta(days=7))


def host_group(timeout_s: float | None = None) -> dist.ProcessGroup:
    """A group of all ranks whose exchanges are in host memory, with a timeout as in `join_ranks`. Collective."""
    return dist.new_group(backend="gloo", timeout=_patience(timeout_s))


def job_store() -> dist.Store:
    """The store in which all ranks of the job may leave words for each other, by a connection of its own."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def _patience(timeout_s: float | None) -> timedelta | None:
    return None if timeout_s is None else timedelta(seconds=timeout_s)


def _own_gpu(local_rank: int, visible: int) -> int:
    if local_rank < visible:
        return local_rank
    raise UserError(
        f"local rank {local_rank} sees {visible} GPU(s): start no more ranks on a host than it has GPUs, and let each "
        "see all of them (srun --gpus-per-node=N --gpu-bind=none, not --gpus-per-task)"
    )
