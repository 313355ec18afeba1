"""A shard that does not fit is refused in one line, whoever sets the bound."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from offload.host.limits import Limit, memory_limits, require_room, size_text
from tests.offload.host.test_cgroup import version2, write

MIB = 1 << 20


def refusal(nbytes: int, limits: list[Limit], ranks: int) -> str:
    with pytest.raises(ValueError, match="leaves") as caught:
        require_room(nbytes, limits, ranks)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_ranks_of_a_machine_share_its_memory() -> None:
    limits = [Limit("the machine", 400 * MIB)]
    require_room(100 * MIB, limits, 4)
    message = refusal(100 * MIB + 4, limits, 4)
    assert message.startswith("the table shards of this machine's 4 ranks take 400.00 MiB of host memory")
    assert "but the machine leaves 400.00 MiB: lower model.engram.rows_per_head" in message


def test_a_processes_own_limit_is_not_shared() -> None:
    limits = [Limit("RLIMIT", 100 * MIB, "raise it", shared=False)]
    require_room(100 * MIB, limits, 4)
    message = refusal(101 * MIB, limits, 4)
    assert message.startswith("this rank's shard of the tables takes 101.00 MiB of host memory")
    assert message.endswith("but RLIMIT leaves 100.00 MiB: raise it")


def test_the_bound_exceeded_by_most_is_named() -> None:
    limits = [Limit("loose", 90), Limit("own", 20, shared=False), Limit("tight", 10), Limit("enough", 1000)]
    assert "but tight leaves 10 B" in refusal(100, limits, 1)
    require_room(100, [], 8)


def test_the_machines_memory_and_its_control_groups_are_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=500 * MIB))
    write(tmp_path / "proc/self/cgroup", "0::/pod")
    version2(tmp_path, "/pod", 300 * MIB, 100 * MIB)
    limits = memory_limits(root=tmp_path)
    assert [limit.free for limit in limits if limit.shared] == [500 * MIB, 200 * MIB]
    message = refusal(150 * MIB, limits, 2)
    assert "2 ranks take 300.00 MiB" in message
    assert "but the limit of 300.00 MiB on control group /pod leaves 200.00 MiB: " in message


@pytest.mark.parametrize(("mode", "bounded"), [(0, False), (1, False), (2, True)])
def test_the_commit_limit_counts_where_the_system_keeps_it(mode: int, bounded: bool, tmp_path: Path) -> None:
    write(tmp_path / "proc/sys/vm/overcommit_memory", mode)
    write(
        tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nCommitLimit: 5000 kB\nCommitted_AS: 4000 kB\nHugePages_Total: 0"
    )
    frees = {limit.free for limit in memory_limits(root=tmp_path) if "overcommit" in limit.source}
    assert frees == ({1000 * 1024} if bounded else set())


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 << 29, "1.50 GiB"), (1 << 60, "1048576.00 TiB")],
)
def test_sizes_are_written_in_their_unit(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


# In a process of its own: nothing else can then fail for want of memory.
LIMITED = """
import json, resource, sys
import psutil
from offload.host.memory import map_anonymous
from offload.host.table import FileTable, HostTable

def attempt(megabytes, folder=None, mapping=None):
    try:
        if mapping:
            table = mapping(megabytes << 20)
        else:
            table = FileTable(megabytes << 11, 128, folder) if folder else HostTable(megabytes << 11, 128)
        table.close()
    except ValueError as error:
        return str(error)
    return "accepted"

HostTable(1, 1)  # whatever is set up once is set up
answers = {}
memory = psutil.Process().memory_info()
for name, limit in {"AS": memory.vms + (64 << 20), "DATA": memory.data + (64 << 20), "FSIZE": 64 << 20}.items():
    number = getattr(resource, "RLIMIT_" + name)
    resource.setrlimit(number, (limit, resource.getrlimit(number)[1]))
    answers[name] = attempt(200), attempt(200, sys.argv[1]), attempt(20), attempt(20, sys.argv[1])
    answers[name] += (attempt(200, mapping=map_anonymous),)
    resource.setrlimit(number, (resource.RLIM_INFINITY, resource.getrlimit(number)[1]))
print(json.dumps(answers))
"""


def test_real_limits_of_the_process(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    ok = "accepted"
    for name, flag in (("AS", "-v"), ("DATA", "-d")):
        memory = answers[name][0]
        assert f"takes 200.00 MiB of host memory, but the process's limit RLIMIT_{name}" in memory
        assert memory.endswith(f"raise it (ulimit {flag} unlimited)")
        assert answers[name][4] == "the system refuses 200.00 MiB of host memory (Cannot allocate memory)"
    for name in ("AS", "DATA"):
        _, file, small, *_ = answers[name]
        assert small == ok
        for answer in (file,):  # stacks take addresses, and are data of the process
            assert "the system refuses 64 threads to wait for the disk (can't start new thread): raise" in answer
    memory, file, *small, bare = answers["FSIZE"]
    assert [memory, *small, bare] == [ok, ok, ok, ok]
    assert file.startswith(f"offload.host_file: cannot keep 200.00 MiB in {tmp_path} (File too large)")
