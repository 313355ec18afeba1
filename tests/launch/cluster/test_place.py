"""A rank's place in its job, as each launcher's environment tells it."""

import pytest

from launch.cluster.place import Place, first_host
from train.errors import UserError

TORCH = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"}
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")} | {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "309264385",
    "PMIX_RANK": "1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "n1"}
SLURM = {
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "1,2(x2)",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
}
PODS = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "job-0.job", "MASTER_PORT": "9000"}
NUMBERS = {
    "torchrun": (TORCH | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, (5, 1, 8, 4, "n1", 1234)),
    "DeepSpeed's launcher": (TORCH | {"LOCAL_SIZE": "4"}, (5, 1, 8, 4, "n1", 1234)),
    "mpirun of Open MPI": (OPEN_MPI, (1, 1, 2, 2, "127.0.0.1", None)),
    "mpirun of MPICH": (HYDRA, (3, 1, 4, 2, "n1", None)),
    "srun": (SLURM, (4, 1, 5, 2, "gpu03", None)),
    "srun and a MASTER_ADDR": (SLURM | {"MASTER_ADDR": "10.0.0.1"}, (4, 1, 5, 2, "10.0.0.1", None)),
    "an indexed Job": (PODS, (2, 0, 4, 1, "job-0.job", 9000)),
    "mpirun that Slurm's step started": (SLURM | OPEN_MPI, (1, 1, 2, 2, "127.0.0.1", None)),
    "torchrun that srun started": (
        SLURM | TORCH | {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "5", "RANK": "3", "TORCHELASTIC_RUN_ID": "x"},
        (3, 1, 5, 4, "n1", 1234),
    ),
}


@pytest.mark.parametrize("launcher", NUMBERS)
def test_every_launcher_tells_a_rank_its_place(launcher: str) -> None:
    environment, (rank, local_rank, size, local_size, address, port) = NUMBERS[launcher]
    place = Place.of(environment)
    assert place is not None
    assert (place.rank, place.local_rank, place.world_size, place.local_world_size) == (
        rank,
        local_rank,
        size,
        local_size,
    )
    assert place.master_addr == address
    assert place.master_port == port if port else 20000 <= place.master_port < 30000


def test_the_port_follows_from_the_jobs_number_alone() -> None:
    def port(**changed: str) -> int:
        place = Place.of(SLURM | changed)
        assert place is not None
        return place.master_port

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({port(SLURM_JOB_ID=str(number)) for number in range(20)}) > 15
    assert port() != port(SLURM_STEP_ID="1")


ALONE = {
    "nobody": {},
    "a shell of srun": SLURM | {"SLURM_STEP_NUM_TASKS": "1"},
    "one task of mpirun": OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    "one pod": {"JOB_COMPLETION_INDEX": "0", "WORLD_SIZE": "1"},
    "a batch script": {name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS")},
    "a master that every container has": {"MASTER_ADDR": "x", "MASTER_PORT": "1"},
}


@pytest.mark.parametrize("who", ALONE)
def test_a_process_that_is_alone_starts_ranks_itself(who: str) -> None:
    assert Place.of(ALONE[who]) is None


def without(environment: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environment.items() if key != name}


WRONG = {
    "half set": (without(TORCH, "MASTER_ADDR"), "^RANK, LOCAL_RANK, WORLD_SIZE, MASTER_PORT set, but not MASTER_ADDR:"),
    "empty": (TORCH | {"MASTER_PORT": ""}, "but not MASTER_PORT"),
    "a world without a rank": ({"WORLD_SIZE": "2"}, "WORLD_SIZE set, but not RANK"),
    "no word of this host's ranks": (TORCH, "LOCAL_WORLD_SIZE is not set"),
    "no number": (TORCH | {"RANK": "first"}, "RANK='first': expected a whole number"),
    "negative": (TORCH | {"RANK": "-1"}, "RANK='-1': expected a whole number"),
    "rank beyond the world": (TORCH | {"RANK": "8", "LOCAL_WORLD_SIZE": "4"}, "rank 8 of 8: ranks are counted from 0"),
    "local rank beyond the host": (TORCH | {"LOCAL_WORLD_SIZE": "1"}, "local rank 1 of 1"),
    "a host larger than the world": (TORCH | {"LOCAL_WORLD_SIZE": "9"}, "9 ranks on this host, but 8 in all"),
    "no such port": (TORCH | {"LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "70000"}, "a port is 1 to 65535"),
    "exported by a batch script": (
        SLURM | TORCH | {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_WORLD_SIZE": "5"},
        "RANK=0, but this is Slurm's task 4 of 5: unset RANK",
    ),
    "several hosts of MPI": (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
                             "mpirun -x MASTER_ADDR"),
    "a batch script that forgot srun": (
        {"SLURM_JOB_ID": "71", "SLURM_PROCID": "0", "SLURM_NNODES": "2"},
        "a batch script of Slurm on 2 nodes: put `srun` before the command",
    ),
    "half of Slurm": (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
    "no node": (without(SLURM, "SLURM_STEP_NODELIST"), "no host in Slurm's node list ''"),
    "pods without a world": (without(PODS, "WORLD_SIZE"), "JOB_COMPLETION_INDEX is set, but not WORLD_SIZE: "),
    "a launcher that nobody knows": ({"PALS_RANKID": "0"}, "PALS_RANKID is set by an unknown launcher"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_environment_is_told_with_the_variable(what: str) -> None:
    environment, message = WRONG[what]
    with pytest.raises(UserError, match=message):
        Place.of(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-012,15],login1", "gpu007"),
        ("a,b[1-2]", "a"),
        ("r[2,4]n[10-11]-ib", "r2n10-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
