"""`engram train` as a rank of others' launchers, and what is told where the ranks could never meet."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ENGRAM, engram, fresh_engram, losses, train, write_job
from tests.distributed import free_port

PYTHON = Path(sys.executable)
MPIRUN = ["mpirun", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "-np", "2"]


def started_by(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a launcher's command line to its end, as a user does who lets it choose the threads."""
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [*map(str, command)],
        env=variables | {"PATH": path, "DS_ACCELERATOR": "cpu"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


TORCHRUN = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCHERS = {
    "torchrun -m": (*TORCHRUN, "-m", "launch"),
    "torchrun --no-python": (*TORCHRUN, "--no-python", *ENGRAM),
    "mpirun": (*MPIRUN, *ENGRAM),
    "deepspeed": (
        *(PYTHON, "-m", "deepspeed.launcher.runner", "--hostfile", "HOSTFILE", "--no_ssh", "--node_rank=0"),
        *("--master_addr=127.0.0.1", "--master_port=PORT", "--no_python", *ENGRAM),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_every_launcher_the_run_has_the_bits_of_our_own(launcher: str, corpus: Path, tmp_path: Path) -> None:
    if shutil.which(str(LAUNCHERS[launcher][0])) is None:
        pytest.skip(f"needs {LAUNCHERS[launcher][0]}")
    (tmp_path / "hostfile").write_text("localhost slots=2\n")
    stands_for = {"HOSTFILE": str(tmp_path / "hostfile"), "--master_port=PORT": f"--master_port={free_port()}"}
    command = [stands_for.get(str(word), word) for word in LAUNCHERS[launcher]]
    job = write_job(tmp_path, corpus)
    result = started_by(*command, "train", str(job), "run.name=theirs")
    assert result.returncode == 0, result.stderr + result.stdout
    train(job, "run.name=ours", "--nproc", "2")
    theirs, ours = (losses(tmp_path / "runs" / name) for name in ("theirs", "ours"))
    assert theirs == ours
    assert result.stdout.count("validation loss ") == 1


@pytest.mark.long
def test_the_pods_of_a_job_leave_logs_and_one_failure_and_every_rank_has_its_share_of_threads(
    corpus: Path, tmp_path: Path
) -> None:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = {"ENGRAM_LOGS": str(tmp_path / "logs"), "ENGRAM_REPORTS": str(tmp_path / "reports")}
    command = [*ENGRAM, "train", str(write_job(tmp_path, corpus)), "offload.window_rows=10"]
    pods = [
        subprocess.Popen(
            command,
            env=os.environ | world | places | {"JOB_COMPLETION_INDEX": str(index), "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in (0, 1)
    ]
    shown = [pod.communicate(timeout=120)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [2, 2]
    assert "step 1 alone needs" not in shown[0], "rank 0's failure is told by whoever started it"
    assert shown[1] == "", "rank 1 writes to its log"
    assert "step 1 alone needs" in (tmp_path / "logs" / "rank1.log").read_text()
    report = json.loads((tmp_path / "reports" / "rank0").read_text())
    assert report["kind"] == "user"


def refused(*arguments: str | Path, **environment: str) -> str:
    """The one line that `engram train` ends with, before a rank could have been imported."""
    result = engram("train", *arguments, RES_OPTIONS="timeout:1 attempts:1", **environment)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line


def place(**changed: str) -> dict[str, str]:
    first = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return first | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | changed


def test_ranks_that_could_never_meet_are_told_within_seconds(tmp_path: Path) -> None:
    job = write_job(tmp_path, tmp_path / "no-data")
    assert "MASTER_ADDR=nowhere.invalid: no such host" in refused(job, **place(MASTER_ADDR="nowhere.invalid"))
    # TEST-NET-3: nobody's address.
    elsewhere = refused(job, **place(MASTER_ADDR="203.0.113.7"))
    assert "not an address of" in elsewhere or "unreachable" in elsewhere
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert f"port {port} is in use there" in refused(job, **place(MASTER_PORT=port))
    assert "MASTER_PORT set, but not WORLD_SIZE" in refused(job, **{**place(), "WORLD_SIZE": ""})
    assert not (tmp_path / "runs").exists()


def test_a_rank_keeps_what_the_user_set_and_gets_its_share_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.cluster.place import Place
    from launch.cluster.started import rank_environment
    from offload.host.cores import usable_cores

    mine = Place("torchrun", 3, 1, 4, 2, "127.0.0.1", 1234)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "9")
    assert rank_environment(mine)["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))
    assert rank_environment(mine)["RANK"] == "3"
    assert "GLOO_SOCKET_IFNAME" not in rank_environment(mine), "other hosts do not reach this one's loopback"
    assert rank_environment(Place("torchrun", 1, 1, 2, 2, "127.0.0.1", 1234))["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert rank_environment(mine)["OMP_NUM_THREADS"] == "6"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert rank_environment(mine)["OMP_NUM_THREADS"] == "7"
    assert rank_environment(mine)["GLOO_SOCKET_IFNAME"] == "ib0"


def test_two_processes_of_one_job_that_each_take_themselves_for_the_whole_are_told_so(
    corpus: Path, tmp_path: Path
) -> None:
    from train.run_lock import lock_run

    (tmp_path / "runs" / "small").mkdir(parents=True)
    job = write_job(tmp_path, corpus)
    os.environ["PBS_JOBID"] = "77"
    try:
        lock = lock_run(tmp_path / "runs" / "small")
    finally:
        del os.environ["PBS_JOBID"]
    with lock:
        same = engram("train", job, "--nproc", "1", PBS_JOBID="77")
        other = engram("train", job, "--nproc", "1", PBS_JOBID="78")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert f"{holder}, of the same job (PBS_JOBID=77), is at work in it: both took themselves for the" in same.stderr
    assert f"another run is at work in it ({holder}); wait for it" in other.stderr


def test_torchrun_tells_the_first_failure_and_not_the_lost_connection_that_followed(tmp_path: Path) -> None:
    program = tmp_path / "rank.py"
    program.write_text("""
import os, pathlib, sys, time
from launch.local.failures import reported
from train.errors import UserError
def body():
    if os.environ["RANK"] == "0":
        while not list(pathlib.Path(__file__).parent.glob("failed")):
            time.sleep(0.05)
        time.sleep(0.5)
        raise ConnectionResetError("by peer")
    pathlib.Path(__file__).with_name("failed").touch()
    raise UserError("the window is too small")
sys.exit(reported(body))
""")
    result = started_by(*TORCHRUN, program)
    assert result.returncode == 1
    assert "the window is too small" in result.stderr.partition("Root Cause")[2]


def test_deepspeeds_argument_is_taken_and_the_rest_refused() -> None:
    assert fresh_engram("--local_rank=1", "train", "--help").returncode == 0
    assert fresh_engram("--local_rang=1", "train", "--help").returncode == 2
