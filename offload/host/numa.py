"""On which NUMA nodes a shard's memory is placed, on machines with more than one."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ROOT = Path("/")
_MBIND = {"x86_64": 237, "aarch64": 235}  # system call numbers, asm/unistd.h
# linux/mempolicy.h. Preferred, not bound: a full node then spills over instead of having the run killed.
_MPOL_PREFERRED, _MPOL_INTERLEAVE = 1, 3
_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


def home_nodes(device: torch.device, root: Path = _ROOT) -> set[int]:
    """The nodes that memory should come from: the GPU's, else those of the CPUs that this process may run on.

    Empty where there is nothing to choose: one node, or a system that does not say.

    Args:
        device: of the window.
        root: where `/proc` and `/sys` are found.
    """
    nodes = _numbers(root / "sys/devices/system/node/has_memory") & _allowed(root)
    if len(nodes) < 2:
        return set()
    if device.type == "cuda" and (node := _gpu_node(device, root)) in nodes:
        return {node}
    cpus = os.sched_getaffinity(0)
    return {node for node in nodes if cpus & _cpus(node, root)}


def place(words_N: Tensor, nodes: set[int], syscall: Callable[..., int] | None = None) -> set[int]:
    """Asks that memory not yet touched come from one node, or from several in turn.

    Args:
        words_N: contiguous, starting at a page boundary.
        nodes: from `home_nodes`.
        syscall: the C library's.

    Returns:
        The nodes; empty if there was nothing to ask for, or the system refused, as containers often do.
    """
    number = _MBIND.get(platform.machine())
    if not nodes or number is None:
        return set()
    mask = (ctypes.c_ulong * (max(nodes) // _BITS + 1))()
    for node in nodes:
        mask[node // _BITS] |= 1 << node % _BITS
    policy = _MPOL_PREFERRED if len(nodes) == 1 else _MPOL_INTERLEAVE
    span = ctypes.c_void_p(words_N.data_ptr()), ctypes.c_ulong(words_N.nbytes)
    # The kernel reads one bit of the mask less than it is told.
    mask_bits = ctypes.c_ulong(len(mask) * _BITS + 1)
    call = syscall or ctypes.CDLL(None, use_errno=True).syscall
    failed = call(ctypes.c_long(number), *span, ctypes.c_int(policy), mask, mask_bits, ctypes.c_uint(0))
    return set() if failed else nodes


@contextmanager
def on_cores_of(nodes: set[int], root: Path = _ROOT) -> Iterator[bool]:
    """Threads that are started inside run on the cores of these nodes: pages that they touch first come from there.

    Args:
        nodes: from `home_nodes`.
        root: where `/sys` is found.

    Yields:
        Whether the system allows it; otherwise they run where the caller does.
    """
    before = os.sched_getaffinity(0)
    try:
        # A thread inherits the cores of the one that starts it.
        os.sched_setaffinity(0, set[int]().union(*(_cpus(node, root) for node in nodes)))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setaffinity(0, before)


def _cpus(node: int, root: Path) -> set[int]:
    return _numbers(root / f"sys/devices/system/node/node{node}/cpulist")


def _gpu_node(device: torch.device, root: Path) -> int:
    gpu: Any = torch.cuda.get_device_properties(device)
    bus = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    node = root / f"sys/bus/pci/devices/{bus}/numa_node"
    return int(node.read_text()) if node.exists() else -1


def _allowed(root: Path) -> set[int]:
    status = root / "proc/self/status"
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("Mems_allowed_list:"):
            return _parse(line.split(":")[1])
    return set()


def _numbers(path: Path) -> set[int]:
    return _parse(path.read_text()) if path.exists() else set()


def _parse(text: str) -> set[int]:
    """Numbers of a kernel list such as `0-3,8`."""
    ranges = (part.strip().partition("-")[::2] for part in text.split(",") if part.strip())
    return {number for first, last in ranges for number in range(int(first), int(last or first) + 1)}
