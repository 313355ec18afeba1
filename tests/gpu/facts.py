"""What a machine with a GPU has, in a few seconds, as JSON: versions, limits, and what pinning its memory takes."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "numpy", "numba", "llvmlite", "deepspeed", "pydantic", "pytest-xdist"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _first_line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return (done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else None


def _pinning(gib: float) -> dict[str, Any]:
    """Seconds a GiB to touch and to register host memory, as the tables do."""
    import torch

    from offload.host.pinned import CudaDriver
    from offload.host.table import HostTable
    from tests.offload.host.pages import pages

    device = torch.device("cuda", 0)
    torch.cuda.init()
    torch.zeros(1, device=device)
    started = time.perf_counter()
    table = HostTable(int(gib * 2**30) // 4 // 256, 256, touch_pages=True, device=device)
    touched = time.perf_counter()
    table.pin(CudaDriver(device), device)
    pinned = time.perf_counter()
    given = asdict(pages(table.records_RW))
    table.close()
    each = 1 / gib
    return {"touch_s_per_GiB": each * (touched - started), "register_s_per_GiB": each * (pinned - touched), **given}


def main() -> None:
    """Prints the facts; a part that fails says why."""
    from train.hardware import describe_machine

    facts: dict[str, Any] = {"versions": _versions(), "machine": describe_machine(1)}
    facts["kernel"] = os.uname().release
    facts["memlock"] = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts["huge_pages"] = _text("/sys/kernel/mm/transparent_hugepage/enabled")
    facts["numa_nodes"] = sorted(path.name for path in Path("/sys/devices/system/node").glob("node[0-9]*"))
    facts["memory"] = dict(line.split(":") for line in (_text("/proc/meminfo") or "").splitlines()[:3])
    facts["shm"] = shutil.disk_usage("/dev/shm")._asdict() if Path("/dev/shm").exists() else None
    facts["compiler"] = _first_line("g++", "--version")
    facts["gpu"] = _first_line(
        "nvidia-smi",
        "--query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.sm,power.limit",
        "--format=csv,noheader",
    )
    try:
        from kernels import compiled_loops

        facts["numba"] = compiled_loops.available()
    except Exception as error:
        facts["numba"] = repr(error)
    if "--no-gpu" not in sys.argv:
        try:
            facts["pinning"] = _pinning(4.0)
        except Exception as error:
            facts["pinning"] = repr(error)
    print(json.dumps(facts, indent=1, default=str))


if __name__ == "__main__":
    main()
