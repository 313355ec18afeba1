"""`engram doctor`: what it finds here, what is missing for a job, and what ranks find together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launch.doctor import ranks
from launch.doctor.check import Check, is_missing, lines
from launch.doctor.disk import disk
from launch.doctor.examine import checks_here
from launch.doctor.memory import memory
from launch.doctor.network import network
from launch.doctor.ranks import between_ranks, rounds
from launch.doctor.software import software
from tests.command_line import engram, write_job
from tests.distributed import free_port, run_ranks
from train.config.file import load
from train.config.job import JobConfig


def findings(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_sound_machine_has_all_that_the_small_job_needs_and_json_says_the_same(tmp_path: Path) -> None:
    job = write_job(tmp_path, tmp_path / "no-data")
    result = engram("doctor", job, "--json", DS_ACCELERATOR="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    told = json.loads(result.stdout)
    assert told["ok"]
    (checks,) = told["hosts"].values()
    by_name = {check["name"]: check for check in checks}
    assert by_name["torch"]["found"] == torch.__version__
    assert "the tables take" in by_name["host memory"]["found"]
    assert "checkpoints take" in by_name["disk space"]["found"]
    assert not (tmp_path / "runs").exists()
    assert list(tmp_path.iterdir()) == [job]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without GPUs")
def test_a_job_that_trains_on_the_cpu_lacks_gpus_only_if_it_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    job = load(write_job(tmp_path, tmp_path / "no-data"), ["run.nproc=2"], JobConfig)
    asked = load(write_job(tmp_path, tmp_path / "no-data"), ["launch.gpus=2"], JobConfig)
    assert findings(checks_here(job, None))["gpus"].status == "warning"
    assert findings(checks_here(asked, None))["gpus"].status == "missing"


def test_tables_beyond_the_memory_are_missing_and_the_exit_code_says_so(tmp_path: Path) -> None:
    job = write_job(tmp_path, tmp_path / "no-data")
    result = engram("doctor", job, "model.engram.rows_per_head=20000000000", DS_ACCELERATOR="cpu")
    assert result.returncode == 1
    missing = [line for line in result.stdout.splitlines() if line.startswith("missing")]
    assert [line[9:23].strip() for line in missing] == ["host memory", "disk space"]
    assert "lower model.engram.rows_per_head" in missing[0]


def test_a_port_in_use_and_a_host_without_address_are_missing() -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        found = findings(list(network(port, ["localhost", "nowhere.invalid"])))
    assert found["port"].status == "missing"
    assert (found["host"].found, found["host"].status) == ("nowhere.invalid is unknown", "missing")
    assert findings(list(network(port, ["localhost"])))["port"].status == "ok"


def test_memory_is_read_from_the_kernels_own_files(tmp_path: Path) -> None:
    pages = tmp_path / "sys/kernel/mm/transparent_hugepage"
    pages.mkdir(parents=True)
    (pages / "enabled").write_text("always madvise [never]")
    for node in (0, 1):
        (tmp_path / f"sys/devices/system/node/node{node}").mkdir(parents=True)
    found = findings(list(memory(0, tmp_path)))
    assert (found["huge pages"].status, found["huge pages"].found) == ("warning", "never")
    assert found["numa"].found == "2 node(s)"
    assert found["/dev/shm"].status == "warning"
    (pages / "enabled").write_text("always [madvise] never")
    assert findings(list(memory(0, tmp_path)))["huge pages"].status == "ok"


def test_a_disk_that_is_too_small_or_cannot_be_written_to_is_missing(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert findings(disk(tmp_path / "a" / "b", 2 * free))["disk space"].status == "missing"
    assert findings(disk(tmp_path / "a" / "b", 1))["disk space"].status == "ok"
    assert findings(disk(Path("/proc/nothing"), 0))["disk"].status == "missing"


def test_a_library_that_is_not_there_is_missing_with_the_command_that_brings_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import metadata

    versions = {"torch": "2.9.1", "deepspeed": "0.20.0", "numpy": "2.4.6"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    found = findings(list(software()))
    assert {name for name, check in found.items() if check.status == "missing"} == {"torch", "deepspeed", "numba"}
    assert found["torch"].remedy == "pip install 'torch>=2.11'"
    assert found["deepspeed"].remedy == "pip install 'deepspeed==0.19.8'"


def test_hosts_that_found_the_same_share_a_line() -> None:
    same, other = Check("torch", "ok", "2.13"), Check("torch", "missing", "2.9", "pip install 'torch>=2.11'")
    by_host = {"n1": [same], "n2": [same], "n3": [other]}
    assert lines(by_host) == [
        "ok       torch          2.13 [n1, n2]",
        "missing  torch          2.9: pip install 'torch>=2.11' [n3]",
    ]
    assert lines({"n1": [same], "n2": [same]}) == ["ok       torch          2.13"]
    assert is_missing(by_host)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_all_pairs_meet_once_and_no_host_is_twice_in_a_round(count: int) -> None:
    hosts = [f"n{number}" for number in range(count)]
    met = []
    for pairs in rounds(hosts):
        busy = [host for pair in pairs for host in pair]
        assert len(set(busy)) == len(busy)
        met += [frozenset(pair) for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2


def find_together(folder: str) -> None:
    rank = dist.get_rank()
    # As if each rank were on a host of its own, the last of them with another disk.
    socket.gethostname = lambda: f"n{rank}"
    found = findings(between_ranks(torch.device("cpu"), Path(folder, "other" if rank == 2 else "shared"), 0))
    assert found["run folder"].status == "missing"
    assert "is another one on n2" in found["run folder"].found
    ranks._BYTES = {"cpu": 1 << 10}
    own = findings(between_ranks(torch.device("cpu"), Path(folder, f"own{rank}"), 0, local=True))["run folder"]
    assert (own.status, "is each host's own" in own.found) == ("ok", True)
    assert found["clocks"].status == "ok"
    assert "GB/s" in found["all-reduce"].found
    assert "GB/s" in found["all-to-all"].found
    assert "slowest is n" in found["pairs of hosts"].found


def test_ranks_find_out_together_who_does_not_share_the_folder_and_which_pair_is_slowest(tmp_path: Path) -> None:
    run_ranks(find_together, 3, str(tmp_path))


@pytest.mark.long
def test_under_a_launcher_rank_0_tells_for_all(tmp_path: Path) -> None:
    job = write_job(tmp_path, tmp_path / "no-data")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    result = subprocess.run(
        [*command, "-m", "launch", "doctor", job, "run.local_checkpoints=true", "--json"],
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (checks,) = json.loads(result.stdout)["hosts"].values()
    assert {"all-to-all", "all-reduce", "clocks", "run folder"} <= {check["name"] for check in checks}
    assert any("is each host's own" in check["found"] for check in checks)
