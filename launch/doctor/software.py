"""Interpreter, libraries, compiler, GPUs."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from launch.doctor.check import Check, Status, bound

_NEEDED = {"torch": (2, 11), "deepspeed": (0, 19, 8), "numpy": (2,), "numba": (0, 61)}
_EXACT = "deepspeed"


def software() -> Iterator[Check]:
    """Python and the libraries, without importing them."""
    version = sys.version_info
    found = f"{version.major}.{version.minor}.{version.micro} at {sys.executable}"
    yield bound("python", "missing", version >= (3, 11), found, "install Python 3.11 or newer")
    for name, wanted in _NEEDED.items():
        yield _library(name, wanted)


def compilers() -> Iterator[Check]:
    """What torch.compile and Triton need: a C++ compiler, Triton itself."""
    name = os.environ.get("CXX") or "g++"
    remedy = "install it, or name another by CXX: train.compile=true needs it"
    yield bound("compiler", "warning", shutil.which(name) is not None, shutil.which(name) or f"no {name}", remedy)
    try:
        yield Check("triton", "ok", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        yield Check("triton", "warning", "not installed", "pip install triton, which GPUs need")


def gpus(wanted: int | None) -> Iterator[Check]:
    """Driver, GPUs and the links between them. `wanted` is how many the job takes here; None: as many as there are."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or wanted == 0:
        yield Check("gpus", "ok", "none wanted")
        return
    if not torch.cuda.is_available():
        reason = "PyTorch is built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        status: Status = "missing" if wanted else "warning"
        remedy = "install the driver and a PyTorch with CUDA, or set launch.gpus=0 to train on the CPU"
        yield Check("gpus", status, f"none in reach of PyTorch ({reason}; driver: {_driver() or 'none'})", remedy)
        return
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    found = f"{count} x {names}, CUDA {torch.version.cuda}, driver {_driver() or 'unknown'}"
    yield bound("gpus", "missing", count >= (wanted or 1), found, f"the job takes {wanted}: lower run.nproc")
    if count > 1:
        apart = [
            f"{one}-{other}"
            for one in range(count)
            for other in range(one)
            if not torch.cuda.can_device_access_peer(one, other)
        ]
        found = f"no direct access {', '.join(apart)}" if apart else "every pair of GPUs reaches each other directly"
        yield bound("gpu links", "warning", not apart, found, "see `nvidia-smi topo -m`; exchanges go by host memory")


def _library(name: str, wanted: tuple[int, ...]) -> Check:
    text = ".".join(map(str, wanted))
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, "missing", "not installed", f"pip install {name}=={text}")
    if importlib.util.find_spec(name) is None:
        return Check(name, "missing", f"{version}, but cannot be found by `import {name}`", "install it again")
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[: len(wanted)] if part.isdecimal())
    fits = parts == wanted if name == _EXACT else parts >= wanted
    return bound(name, "missing", fits, version, f"pip install '{name}{'==' if name == _EXACT else '>='}{text}'")


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return told[0] if told else None
