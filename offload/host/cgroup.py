"""Memory that the control groups of this process still allow it: containers, batch jobs, services."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class CgroupMemory(NamedTuple):
    """The memory bound of one control group."""

    path: str
    """Its path below the mount point, as in /proc/self/cgroup."""
    limit: int
    """Bytes that all its processes may take together."""
    free: int
    """Bytes that they may still take; file pages that the kernel drops when they are needed count as free."""


def cgroup_memory(root: Path = Path("/")) -> Iterator[CgroupMemory]:
    """The bounds of the process's own group and of every group around it, version 1 and 2.

    Groups that cannot be seen from here (a container's host) are left out: nothing is known about them.

    Args:
        root: where `/proc` and `/sys` are found.
    """
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _nested(root / "sys/fs/cgroup", path, _version2)
        elif "memory" in controllers.split(","):
            yield from _nested(root / "sys/fs/cgroup/memory", path, _version1)


def _nested(mount: Path, path: str, bounds: Callable[[Path], tuple[int, int, int] | None]) -> Iterator[CgroupMemory]:
    # Inside a container the path may be that of the host, where only its root is mounted: what is missing is skipped.
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts) if ".." not in parts else 0, -1, -1):
        found = bounds(mount.joinpath(*parts[:depth]))
        if found is not None:
            limit, used, reclaimable = found
            yield CgroupMemory("/" + "/".join(parts[:depth]), limit, max(0, limit - max(0, used - reclaimable)))


def _version2(group: Path) -> tuple[int, int, int] | None:
    if not (group / "memory.max").exists() or (limit := (group / "memory.max").read_text().strip()) == "max":
        return None
    used = int((group / "memory.current").read_text())
    return int(limit), used, _statistics(group, "inactive_file", "active_file", "slab_reclaimable")


def _version1(group: Path) -> tuple[int, int, int] | None:
    if not (group / "memory.limit_in_bytes").exists():
        return None
    limit, used = (int((group / f"memory.{name}_in_bytes").read_text()) for name in ("limit", "usage"))
    return limit, used, _statistics(group, "total_inactive_file", "total_active_file")


def _statistics(group: Path, *names: str) -> int:
    values = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(values.get(name, 0)) for name in names)
