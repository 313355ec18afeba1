"""What a local rank finds in its environment: who it is, where the ranks meet, how many threads are its share."""

import ctypes
import errno
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from offload.host.cores import usable_cores
from train.errors import UserError

_LOOPBACK = "lo"
_CUDA_DRIVER = "libcuda.so.1"
_ROCM_DEVICE = Path("/dev/kfd")
# Ranks listen seconds after their port is chosen: by then a connection may have taken a port of those that the system
# gives to connections (Linux: from 32,768 on).
_UNASSIGNED = range(15_000, 32_000)
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
"""glibc's settings to keep freed memory. By default it returns large blocks to the system at once, and a CPU rank
spends a tenth of its step on page faults in memory that it had a moment ago."""


def rank_environment(rank: int, nproc: int, port: int, gpus: int) -> dict[str, str]:
    """This process's environment with the variables of `torch.distributed`'s `env://` for one of `nproc` local ranks.

    OMP_NUM_THREADS is the rank's share of the cores unless it is set; without GPUs, DeepSpeed is told to use the CPU,
    and the C library to keep freed memory.
    """
    environment = {
        # Under a name that does not resolve, gloo finds no address; all ranks are on this machine anyway.
        **({"GLOO_SOCKET_IFNAME": _LOOPBACK} if (1, _LOOPBACK) in socket.if_nameindex() else {}),
        "OMP_NUM_THREADS": str(max(1, usable_cores() // nproc)),
        "PYTHONUNBUFFERED": "1",
        **({} if gpus else KEEP_MEMORY),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def meeting_port(wanted: int | None) -> int:
    """`wanted` if nobody listens there; for None, a free TCP port of this machine.

    Raises:
        UserError: the wanted port is in use or not allowed.
    """
    if wanted is None:
        return next(filter(_is_free, random.SystemRandom().sample(_UNASSIGNED, len(_UNASSIGNED))))
    try:
        with socket.create_server(("", wanted)):
            return wanted
    except OSError as error:
        reason = {errno.EADDRINUSE: "already in use on this machine", errno.EACCES: "reserved for the administrator"}
        told = reason.get(error.errno or 0, str(error))
        raise UserError(
            f"port {wanted}: {told}; choose another one, or none (run.port=null) to get a free one"
        ) from None


def may_use_gpus() -> bool:
    """Whether this machine has a GPU's driver and DS_ACCELERATOR=cpu does not keep ranks off it."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    try:
        ctypes.CDLL(_CUDA_DRIVER)
    except OSError:
        return _ROCM_DEVICE.exists()
    return True


def visible_gpus() -> int:
    """GPUs that ranks of this machine may use.

    PyTorch counts them, in a process of its own: a launcher that imported it would not hear signals meanwhile.
    """
    if not may_use_gpus():
        return 0
    counted = subprocess.run(
        [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        start_new_session=True,
    )
    return int(counted.stdout)


def rank_count(wanted: int | None, gpus: int) -> int:
    """Local ranks to start: as many as wanted, or one per GPU, or 2 on a machine without.

    Raises:
        UserError: more ranks than GPUs, where there are any.
    """
    count = wanted or gpus or 2
    if 0 < gpus < count:
        raise UserError(
            f"{count} ranks on {gpus} GPU(s): every rank needs one; lower --nproc, or set DS_ACCELERATOR=cpu"
        )
    return count


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True
