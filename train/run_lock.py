"""The lock that keeps a run's folder to one run, and who holds it."""

import os
import socket
from pathlib import Path
from typing import TextIO

from train.errors import UserError
from train.files import try_lock

LOCK_FILE = ".lock"
_JOBS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


def lock_run(folder: Path) -> TextIO:
    """Holds the lock of a run's folder as long as the returned file is open.

    Raises:
        UserError: another process holds it, which the message names.
    """
    path = folder / LOCK_FILE
    lock = try_lock(path)
    if lock is not None:
        lock.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", _job(), sep="\n", file=lock, flush=True)
        return lock
    holder, _, job = path.read_text(encoding="utf-8").strip().partition("\n")
    if job and job == _job():
        raise UserError(
            f"{folder}: {holder}, of the same job ({job}), is at work in it: both took themselves for the whole job; "
            "start them by srun, mpirun or torchrun, so that each is told its rank"
        )
    by = f" ({holder})" if holder else ""
    raise UserError(f"{folder}: another run is at work in it{by}; wait for it, or choose another run.name")


def _job() -> str:
    """What the job's scheduler or launcher calls it; empty outside of one."""
    return next((f"{name}={os.environ[name]}" for name in _JOBS if os.environ.get(name)), "")
