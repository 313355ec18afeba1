"""Host memory against the job's tables, and what the system allows to be done with it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.check import Check, bound
from offload.host.limits import locking_limits, memory_limits, size_text

_ROOT = Path("/")
_SHM_BYTES = 1 << 30


def memory(table_bytes: int, root: Path = _ROOT) -> Iterator[Check]:
    """Checks of memory. `table_bytes` is what this host's ranks keep of the tables; 0 without a job."""
    tightest = min(memory_limits(root=root), key=lambda limit: limit.free)
    found = f"{size_text(tightest.free)} left by {tightest.source}"
    if table_bytes:
        found += f"; the tables take {size_text(table_bytes)} of each host"
    yield bound("host memory", "missing", table_bytes <= tightest.free, found, tightest.remedy)
    limits = locking_limits()
    yield bound("memlock", "warning", not limits, "limited" if limits else "no limit", "; ".join(limits))
    yield _huge_pages(root)
    nodes = sorted(path.name for path in (root / "sys/devices/system/node").glob("node[0-9]*"))
    yield Check("numa", "ok", f"{len(nodes)} node(s)" if nodes else "one memory for all cores")
    yield _shared_memory(root)


def _huge_pages(root: Path) -> Check:
    path = root / "sys/kernel/mm/transparent_hugepage/enabled"
    if not path.exists():
        return Check("huge pages", "warning", "this kernel has none", "rows in small pages cost the CPU more look-ups")
    chosen = path.read_text().partition("[")[2].partition("]")[0]
    return bound("huge pages", "warning", chosen in ("always", "madvise"), chosen, f"echo madvise > {path}")


def _shared_memory(root: Path) -> Check:
    folder = root / "dev/shm"
    if not folder.is_dir():
        return Check("/dev/shm", "warning", "not there", "mount it: NCCL uses it between a host's ranks")
    free = shutil.disk_usage(folder).free
    remedy = "start the container with --shm-size=16g (launch.kubernetes.shm_gib)"
    return bound("/dev/shm", "warning", free >= _SHM_BYTES, f"{size_text(free)} free", remedy)
