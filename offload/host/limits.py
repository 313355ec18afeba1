"""What bounds the host memory of a shard: the machine, control groups, and the process's own limits.

Untouched pages cost nothing, so a table that does not fit would be mapped readily, and the run killed hours later, when
its last pages are written. Therefore every bound is compared with the whole shard before a row is touched.
"""

import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from offload.errors import Unavailable
from offload.host.cgroup import cgroup_memory

_ROOT = Path("/")
_SMALLER = "lower model.engram.rows_per_head, use more machines, or set offload.host_file to a folder on a local disk"


@dataclass(frozen=True)
class Limit:
    """One bound on the memory that may still be taken."""

    source: str
    """Who sets it, as messages call it."""
    free: int
    """Bytes that may still be taken under it."""
    remedy: str = _SMALLER
    """What the user can do about it."""
    shared: bool = True
    """Whether a machine's ranks draw on it together; else each process has its own."""


def local_ranks() -> int:
    """Ranks of this job on this machine, as the launcher says (LOCAL_WORLD_SIZE); 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_room(nbytes: int, limits: Iterable[Limit], ranks: int) -> None:
    """Refuses a shard that does not fit.

    Args:
        nbytes: bytes of this rank's shard; those of the machine's other ranks differ by a few rows only.
        limits: bounds to keep, such as `memory_limits()`.
        ranks: ranks of this job on this machine.

    Raises:
        Unavailable: naming the bound that is exceeded most.
    """
    exceeded = [limit for limit in limits if _needed(nbytes, limit, ranks) > limit.free]
    if not exceeded:
        return
    worst = max(exceeded, key=lambda limit: _needed(nbytes, limit, ranks) - limit.free)
    shards = f"the table shards of this machine's {ranks} ranks take"
    if ranks == 1 or not worst.shared:
        shards = "this rank's shard of the tables takes"
    needed = size_text(_needed(nbytes, worst, ranks))
    raise Unavailable(
        f"{shards} {needed} of host memory, but {worst.source} leaves {size_text(worst.free)}: {worst.remedy}"
    )


def memory_limits(*, root: Path = _ROOT) -> list[Limit]:
    """Every bound on anonymous memory.

    RLIMIT_MEMLOCK is not one: NVIDIA's driver locks memory without regard to it.

    Args:
        root: where `/proc` and `/sys` are found.
    """
    limits = [Limit("the machine", psutil.virtual_memory().available)]
    limits += [
        Limit(f"the limit of {size_text(group.limit)} on control group {group.path}", group.free)
        for group in cgroup_memory(root)
    ]
    limits += [*_commit_limit(root), *address_limits()]
    limits += _process_limit("RLIMIT_DATA", "-d", used=getattr(psutil.Process().memory_info(), "data", 0))
    return limits


def address_limits() -> list[Limit]:
    """The bound on memory-mapped files, which take addresses but no memory that the system cannot reclaim."""
    return [*_process_limit("RLIMIT_AS", "-v", used=psutil.Process().memory_info().vms)]


def locking_limits() -> list[str]:
    """The limit on what the process may lock, if it has one, and what to do should a system's driver respect it."""
    limits = _process_limit("RLIMIT_MEMLOCK", "-l", used=0)
    container = "or start the container with --ulimit memlock=-1"
    return [f"{limit.source} counts here: {limit.remedy}, {container}" for limit in limits]


def size_text(nbytes: int) -> str:
    """A size in the largest unit that it fills, such as `1.50 GiB`."""
    power = max(0, min(4, (nbytes.bit_length() - 1) // 10))
    return f"{nbytes / 1024**power:.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _needed(nbytes: int, limit: Limit, ranks: int) -> int:
    return nbytes * ranks if limit.shared else nbytes


def _process_limit(name: str, flag: str, *, used: int) -> Iterator[Limit]:
    soft, _ = resource.getrlimit(getattr(resource, name))
    if soft != resource.RLIM_INFINITY:
        source = f"the process's limit {name} of {size_text(soft)}"
        yield Limit(source, max(0, soft - used), f"raise it (ulimit {flag} unlimited)", shared=False)


def _commit_limit(root: Path) -> Iterator[Limit]:
    mode = root / "proc/sys/vm/overcommit_memory"
    if not mode.exists() or mode.read_text().strip() != "2":
        return
    lines = (root / "proc/meminfo").read_text().splitlines()
    kib = {line.split()[0]: int(line.split()[1]) for line in lines}
    free = 1024 * (kib["CommitLimit:"] - kib["Committed_AS:"])
    remedy = f"raise vm.overcommit_ratio, set vm.overcommit_memory=0, or {_SMALLER}"
    yield Limit("the system's commit limit (vm.overcommit_memory=2)", max(0, free), remedy)
