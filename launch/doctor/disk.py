"""The disk of the run's folder: space, speed, and whether other hosts see it."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil

from launch.doctor.check import Check, bound
from offload.host.limits import size_text

_PROBE_BYTES = 64 << 20
_SLOW = 100e6
_SHARED = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "glusterfs",
    "9p",
    "virtiofs",
    "weka",
    "wekafs",
}


def disk(folder: Path, needed: int) -> list[Check]:
    """Checks of the disk under `folder`, which need not exist yet.

    `needed` are the bytes of the checkpoints to come. Writes 64 MiB and removes them again.
    """
    place = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(place).free
    found = f"{size_text(free)} free in {place}" + (f"; checkpoints take {size_text(needed)}" if needed else "")
    checks = [
        bound("disk space", "missing", needed <= free, found, "set run.dir to a larger disk, or lower checkpoint.keep")
    ]
    try:
        rate = _write_rate(place)
    except OSError as error:
        return [
            *checks,
            Check("disk", "missing", f"{place}: {error.strerror}", "set run.dir to a folder you may write to"),
        ]
    found = f"{rate / 1e6:,.0f} MB/s written to {place}"
    checks.append(
        bound("disk speed", "warning", rate >= _SLOW, found, "a save takes long: set run.dir to a faster disk")
    )
    kind = file_system(place)
    seen = "probably seen by all hosts" if kind in _SHARED else "probably this host's alone"
    return [*checks, Check("file system", "ok", f"{kind}, {seen}")]


def file_system(folder: Path) -> str:
    """Type of the file system that a folder is on."""
    real = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[each] for each in (real, *real.parents) if each in mounts), "unknown")


def _write_rate(folder: Path) -> float:
    block = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(_PROBE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _PROBE_BYTES / (time.perf_counter() - started)
