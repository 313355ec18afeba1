"""Control groups of both versions, nested, on a file tree like the kernel's."""

from pathlib import Path

import pytest

from offload.host.cgroup import cgroup_memory

UNLIMITED_V1 = "9223372036854771712"


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def statistics_text(statistics: dict[str, int]) -> str:
    return "\n".join(f"{name} {value}" for name, value in ({"anon": 0, "shmem": 0} | statistics).items())


def version2(root: Path, group: str, limit: object, used: int, **statistics: int) -> None:
    folder = root / "sys/fs/cgroup" / group.strip("/")
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", statistics_text(statistics))


def version1(root: Path, group: str, limit: object, used: int, **statistics: int) -> None:
    folder = root / "sys/fs/cgroup/memory" / group.strip("/")
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", used)
    write(folder / "memory.stat", statistics_text(statistics))


def found(root: Path) -> dict[str, int]:
    return {group.path: group.free for group in cgroup_memory(root)}


def test_every_group_around_the_process_counts(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/slurm/job_7/step_0")
    version2(tmp_path, "/slurm", 1000, 900)
    version2(tmp_path, "/slurm/job_7", 500, 100)
    version2(tmp_path, "/slurm/job_7/step_0", "max", 100)
    version2(tmp_path, "/other", 1, 1)
    assert found(tmp_path) == {"/slurm": 100, "/slurm/job_7": 400}


def test_a_container_is_bound_by_the_root_that_it_sees(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    version2(tmp_path, "/", 1000, 400)
    assert found(tmp_path) == {"/": 600}


@pytest.mark.parametrize("path", ["/docker/0123", "/../outside"])
def test_a_path_that_the_container_cannot_see_leads_to_its_root(path: str, tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", f"5:cpu:/a\n4:memory:{path}\n0::/")
    version1(tmp_path, "/", 1000, 400)
    assert found(tmp_path) == {"/": 600}


def test_version_1_beside_version_2(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "9:name=systemd:/\n4:hugetlb,memory:/jobs/a\n0::/jobs")
    version1(tmp_path, "/jobs/a", 300, 100)
    version1(tmp_path, "/", UNLIMITED_V1, 100)
    groups = found(tmp_path)
    assert groups["/jobs/a"] == 200
    assert groups["/"] > 1 << 60


def test_file_pages_count_as_free_and_the_processes_pages_do_not(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    version2(tmp_path, "/", 1000, 990, anon=400, active_file=300, inactive_file=200, slab_reclaimable=50)
    assert found(tmp_path) == {"/": 560}
    write(tmp_path / "proc/self/cgroup", "4:memory:/")
    version1(tmp_path, "/", 1000, 990, active_file=1, total_active_file=300, total_inactive_file=200)
    assert found(tmp_path) == {"/": 510}


def test_a_group_above_its_limit_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/")
    version2(tmp_path, "/", 1000, 1200)
    assert found(tmp_path) == {"/": 0}


def test_a_system_without_control_groups_has_no_such_bound(tmp_path: Path) -> None:
    assert found(tmp_path) == {}


def test_this_machines_groups_can_be_read() -> None:
    assert all(0 <= group.free <= group.limit for group in cgroup_memory())
