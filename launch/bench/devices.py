"""The device that is measured."""

from pathlib import Path
from typing import Any, Literal

import torch

_DRIVER = Path("/proc/driver/nvidia/version")


def chosen_device(name: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """What `auto` means here: a GPU where there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(name: Literal["cpu", "cuda"]) -> torch.device:
    """The device, a GPU by its number.

    Raises:
        ValueError: there is no GPU.
    """
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("torch finds no usable GPU: measure with --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def finish(device: torch.device) -> None:
    """Waits until the device has done all the work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_gpu() -> dict[str, Any]:
    """The first GPU and its driver, as a JSON object; empty where there is none."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_processors": properties.multi_processor_count,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "triton": _triton(),
    }


def _driver() -> str | None:
    try:
        words = _DRIVER.read_text(encoding="utf-8").split("\n")[0].split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)
