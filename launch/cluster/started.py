"""Makes a process that another launcher started one of the ranks that `engram train` starts."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launch.cluster.meeting import check_meeting, interface_to
from launch.cluster.place import Place
from launch.local.environment import KEEP_MEMORY, may_use_gpus
from launch.local.failures import REPORT_FILE
from offload.host.cores import usable_cores
from train.errors import UserError

LOGS = "ENGRAM_LOGS"
"""Environment variable with the folder for logs of ranks other than 0; unset: they write to the launcher's output."""
REPORTS = "ENGRAM_REPORTS"
"""Environment variable with the folder in which each rank that fails leaves its `RankReport`."""


def become_rank(place: Place, command: Sequence[str]) -> NoReturn:
    """Runs `command`, the command line of a rank, in place of this process, in the environment that a rank needs.

    Raises:
        UserError: the ranks cannot meet where they are told to, or the folders for logs cannot be made.
    """
    check_meeting(place)
    environment = rank_environment(place)
    try:
        if folder := environment.get(REPORTS):
            Path(folder).mkdir(parents=True, exist_ok=True)
            report = Path(folder, f"rank{place.rank}")
            report.unlink(missing_ok=True)  # of an earlier attempt
            environment[REPORT_FILE] = str(report)
        if (folder := environment.get(LOGS)) and place.rank:
            _write_to(Path(folder), place.rank)
    except OSError as error:
        raise UserError(f"{folder}: cannot write logs into it ({error.strerror})") from None
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], [*command], environment)


def rank_environment(place: Place) -> dict[str, str]:
    """This process's environment, completed: who the rank is, its threads, the interface to the other hosts.

    What the user set stays, except who the rank is.
    """
    interface = interface_to(place)
    cores = os.environ.get("SLURM_CPUS_PER_TASK") or str(max(1, usable_cores() // place.local_world_size))
    return {
        "OMP_NUM_THREADS": cores,
        "PYTHONUNBUFFERED": "1",
        # Else gloo takes the address that the host's own name resolves to, often one that only this host can reach.
        **({"GLOO_SOCKET_IFNAME": interface} if interface else {}),
        **({} if may_use_gpus() else KEEP_MEMORY),
        **os.environ,
        **place.variables(),
    }


def _write_to(folder: Path, rank: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(log)
