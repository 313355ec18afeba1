"""The lock that keeps a run's folder to one run, and who holds it."""

import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from train.errors import UserError
from train.files import lock_file
from train.run_folder import LOCK_FILE

_HOLDER_FILE = ".lock-holder"  # whoever tries the lock empties its own file
_SEPARATOR = "\n"
_JOBS = ("SLURM_JOB_ID", "PMIX_NAMESPACE", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


def lock_run(folder: Path) -> FileLock:
    """Holds the lock of a run's folder as long as the returned object lives.

    Raises:
        UserError: another process holds it, which the message names.
        OSError: it cannot be made.
    """
    lock, holder_file = lock_file(folder / LOCK_FILE), folder / _HOLDER_FILE
    try:
        lock.acquire(timeout=0)
    except Timeout:
        told = holder_file.read_text(encoding="utf-8", errors="replace") if holder_file.exists() else ""
        raise UserError(f"{folder}: {_taken_by(*told.partition(_SEPARATOR)[::2])}") from None
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    holder_file.write_text(f"{holder}{_SEPARATOR}{_job()}", encoding="utf-8")
    return lock


def _taken_by(holder: str, job: str) -> str:
    if job and job == _job():
        return (
            f"{holder}, of the same job ({job}), is at work in it: both took themselves for the whole job; "
            "start them by srun, mpirun or torchrun, so that each is told its rank"
        )
    by = f" ({holder})" if holder else ""
    return f"another run is at work in it{by}; wait for it, or choose another run.name"


def _job() -> str:
    """What the job's scheduler or launcher calls it; empty outside of one."""
    return next((f"{name}={os.environ[name]}" for name in _JOBS if os.environ.get(name)), "")
