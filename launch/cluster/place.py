"""Which rank of which job this process is, if another launcher started it: read from its environment, once.

The names are those that the launchers set: torchrun, Open MPI, MPICH and Intel MPI (Hydra), Slurm's srun, Kubernetes'
indexed Jobs. DeepSpeed's launcher sets torchrun's.
"""

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from train.errors import UserError

Environment = Mapping[str, str]

_FIRST_PORT, _PORTS = 20000, 10000  # below those that Linux gives to outgoing connections
_OTHERS = ("PMIX_RANK", "PMI_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "MV2_COMM_WORLD_RANK")
_BY_HAND = "RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


@dataclass(frozen=True)
class Place:
    """A rank's place in its job. `launcher` is where it was read from, in words."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """What `torch.distributed` and DeepSpeed look for."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }

    @classmethod
    def of(cls, environment: Environment) -> Self | None:
        """The place given by `environment`; None where no launcher started this process, or it started no other.

        Raises:
            UserError: the variables are incomplete or contradict each other, or are those of an unknown launcher.
        """
        if {"RANK", "LOCAL_RANK"} & environment.keys():
            return cls(*_of_torch(environment))
        for launcher, mark, read in (
            ("Open MPI", "OMPI_COMM_WORLD_RANK", _of_open_mpi),
            ("MPI (Hydra)", "MPI_LOCALRANKID", _of_hydra),
            ("Slurm", "SLURM_STEP_ID", _of_slurm),
            ("Kubernetes", "JOB_COMPLETION_INDEX", _of_kubernetes),
        ):
            if mark in environment:
                numbers, master = read(environment)
                # A single task may be a shell, or stand for a whole machine: it starts ranks of its own.
                return cls(launcher, *_in_range(launcher, *numbers), *master) if numbers[2] > 1 else None
        _refuse_leftovers(environment)
        return None


Numbers = tuple[int, int, int, int]
Master = tuple[str, int]


def _of_torch(environment: Environment) -> tuple[str, int, int, int, int, str, int]:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the environment"
    wanted = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in wanted if not environment.get(name)]:
        told = [name for name in wanted if environment.get(name)]
        raise UserError(
            f"{', '.join(told) or 'RANK'} set, but not {', '.join(missing)}: a launcher sets all of {_BY_HAND}; "
            "set those that are missing, or unset all of them"
        )
    rank, local_rank, world_size = (_number(environment, name) for name in wanted[:3])
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), None)
    if local_size is None and world_size > 1:
        raise UserError("LOCAL_WORLD_SIZE is not set: set it to the number of ranks on this host")
    numbers = rank, local_rank, world_size, _number(environment, local_size) if local_size else 1
    _refuse_another_task(environment, rank, world_size)
    return launcher, *_in_range(launcher, *numbers), environment["MASTER_ADDR"], _port(environment, "")


def _of_open_mpi(environment: Environment) -> tuple[Numbers, Master]:
    numbers = _four(environment, *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "LOCAL_RANK", "SIZE", "LOCAL_SIZE")))
    return numbers, _master_of_mpi(environment, numbers, "mpirun -x MASTER_ADDR=...")


def _of_hydra(environment: Environment) -> tuple[Numbers, Master]:
    numbers = _four(environment, "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS")
    return numbers, _master_of_mpi(environment, numbers, "mpirun -genv MASTER_ADDR ...")


def _master_of_mpi(environment: Environment, numbers: Numbers, how: str) -> Master:
    _, _, size, local_size = numbers
    address = environment.get("MASTER_ADDR") or ("127.0.0.1" if size == local_size else None)
    if address is None:
        raise UserError(f"MPI's ranks are on several hosts, and MASTER_ADDR is not set: name rank 0's host by `{how}`")
    return address, _port(environment, environment.get("PMIX_NAMESPACE", str(os.getppid())))


def _of_slurm(environment: Environment) -> tuple[Numbers, Master]:
    size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    rank, local_rank, world_size = (_number(environment, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", size))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    by_node = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
        for _ in range(int(times or 1))
    ]  # fmt: skip
    node = _number(environment, "SLURM_NODEID")
    if node >= len(by_node):
        raise UserError(f"Slurm says node {node}, but SLURM_STEP_TASKS_PER_NODE={tasks!r}: is this a step of srun?")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    address = environment.get("MASTER_ADDR") or first_host(hosts)
    job = f"{environment.get('SLURM_JOB_ID')}.{environment['SLURM_STEP_ID']}"
    return (rank, local_rank, world_size, by_node[node]), (address, _port(environment, job))


def _of_kubernetes(environment: Environment) -> tuple[Numbers, Master]:
    wanted = ("WORLD_SIZE",) if environment.get("WORLD_SIZE") == "1" else ("WORLD_SIZE", "MASTER_ADDR")
    if missing := [name for name in wanted if not environment.get(name)]:
        raise UserError(
            f"JOB_COMPLETION_INDEX is set, but not {' and '.join(missing)}: in the Job's env, set WORLD_SIZE to its "
            "completions and MASTER_ADDR to the name of its first pod (NAME-0.SERVICE)"
        )
    numbers = _number(environment, "JOB_COMPLETION_INDEX"), 0, _number(environment, "WORLD_SIZE"), 1
    address = environment.get("MASTER_ADDR", "")
    return numbers, (address, _port(environment, address))


def first_host(node_list: str) -> str:
    """The first host of a list in Slurm's notation, such as n3 of `n[3-5,8],m1`.

    Raises:
        UserError: there is none.
    """
    first = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+", node_list)
    if first is None:
        raise UserError(f"no host in Slurm's node list {node_list!r}; set MASTER_ADDR to the host of task 0")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _refuse_leftovers(environment: Environment) -> None:
    """Refuses a process that is one of several but cannot know which: it would take itself for the whole job."""
    if "WORLD_SIZE" in environment:
        raise UserError(f"WORLD_SIZE set, but not RANK: a launcher sets all of {_BY_HAND}; unset it, or set all")
    if "SLURM_PROCID" in environment and environment.get("SLURM_NNODES", "1") != "1":
        raise UserError(
            f"a batch script of Slurm on {environment['SLURM_NNODES']} nodes: put `srun` before the command"
        )
    if found := next((name for name in _OTHERS if name in environment), None):
        raise UserError(f"{found} is set by an unknown launcher: have it set {_BY_HAND} for each process")


def _refuse_another_task(environment: Environment, rank: int, world_size: int) -> None:
    """Refuses variables that a batch script exported: they are the same in all tasks of srun."""
    if "TORCHELASTIC_RUN_ID" in environment or "SLURM_STEP_ID" not in environment:
        return
    tasks, task = environment.get("SLURM_STEP_NUM_TASKS"), environment.get("SLURM_PROCID")
    if tasks == str(world_size) and task != str(rank):
        raise UserError(f"RANK={rank}, but this is Slurm's task {task} of {tasks}: unset RANK, LOCAL_RANK, WORLD_SIZE")


def _four(environment: Environment, *names: str) -> Numbers:
    rank, local_rank, world_size, local_world_size = (_number(environment, name) for name in names)
    return rank, local_rank, world_size, local_world_size


def _number(environment: Environment, name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise UserError(f"{name} is not set, though other variables of its launcher are: start it by that launcher")
    if not re.fullmatch(r"\d{1,9}", text):
        raise UserError(f"{name}={text!r}: expected a whole number")
    return int(text)


def _port(environment: Environment, job: str) -> int:
    """MASTER_PORT, or one derived from `job`, a name that all of the job's ranks, and no other job's, know."""
    if "MASTER_PORT" not in environment:
        return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS
    port = _number(environment, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise UserError(f"MASTER_PORT={port}: a port is 1 to 65535")
    return port


def _in_range(launcher: str, rank: int, local_rank: int, world_size: int, local_world_size: int) -> Numbers:
    for name, number, count in (("rank", rank, world_size), ("local rank", local_rank, local_world_size)):
        if number >= count:
            raise UserError(f"{launcher} says {name} {number} of {count}: ranks are counted from 0")
    if local_world_size > world_size:
        raise UserError(f"{launcher} says {local_world_size} ranks on this host, but {world_size} in all")
    return rank, local_rank, world_size, local_world_size
