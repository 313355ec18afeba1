"""Placement on NUMA nodes: which, and what the kernel is asked."""

import ctypes
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload.host import table as host_table
from offload.host.memory import touch
from offload.host.numa import home_nodes, on_cores_of, place
from offload.host.table import HostTable
from tests.offload.host.test_cgroup import write

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
PREFERRED, INTERLEAVE = 1, 3


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of four CPUs each, a third without memory, and a GPU at node 1."""
    write(tmp_path / "proc/self/status", "Cpus_allowed_list:\t0-7\nMems_allowed_list:\t0-1")
    write(tmp_path / "sys/devices/system/node/has_memory", "0-1")
    for node, cpus in enumerate(["0-3", "4-5,6-7", "8"]):
        write(tmp_path / f"sys/devices/system/node/node{node}/cpulist", cpus)
    write(tmp_path / "sys/bus/pci/devices/0001:0a:1f.0/numa_node", 1)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(pci_domain_id=1, pci_bus_id=10, pci_device_id=31),
    )
    return tmp_path


@pytest.mark.parametrize(
    ("cpus", "nodes"), [({0, 1}, {0}), ({5}, {1}), ({3, 4}, {0, 1}), (set(range(9)), {0, 1}), ({8}, set())]
)
def test_memory_is_at_home_where_the_process_runs(
    cpus: set[int], nodes: set[int], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: cpus)
    assert home_nodes(CPU, machine) == nodes


@pytest.mark.parametrize(("node", "nodes"), [(1, {1}), (-1, {0}), (2, {0})])
def test_memory_is_at_home_beside_the_gpu_if_that_is_known(
    node: int, nodes: set[int], machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    write(machine / "sys/bus/pci/devices/0001:0a:1f.0/numa_node", node)
    assert home_nodes(GPU, machine) == nodes


@pytest.mark.parametrize(
    ("file", "text"), [("sys/devices/system/node/has_memory", "0"), ("proc/self/status", "Mems_allowed_list: 1")]
)
def test_one_usable_node_leaves_nothing_to_choose(file: str, text: str, machine: Path) -> None:
    write(machine / file, text)
    assert home_nodes(CPU, machine) == home_nodes(GPU, machine) == set()


def test_a_system_that_does_not_tell_its_nodes_is_left_alone(tmp_path: Path) -> None:
    assert home_nodes(CPU, tmp_path) == set()


class Kernel:
    """Takes the place of the C library's `syscall`."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.calls = answer, []

    def __call__(self, *arguments: Any) -> int:
        number, address, length, policy, mask, bits, flags = arguments
        nodes = {n for n in range(bits.value - 1) if mask[n // 64] >> n % 64 & 1}
        self.calls.append((number.value, address.value, length.value, policy.value, nodes, flags.value))
        return self.answer


@pytest.mark.parametrize(("nodes", "policy"), [({63}, PREFERRED), ({0, 3}, INTERLEAVE), ({2, 64, 130}, INTERLEAVE)])
def test_the_kernel_is_asked_for_one_node_or_for_turns(
    nodes: set[int], policy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    words, kernel = torch.zeros(1000), Kernel()
    assert place(words, nodes, kernel) == nodes
    assert kernel.calls == [(237, words.data_ptr(), 4000, policy, nodes, 0)]


def test_nothing_is_asked_without_a_choice_or_on_an_unknown_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    assert place(torch.zeros(10), set(), kernel) == set()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert place(torch.zeros(10), {0, 1}, kernel) == set()
    assert kernel.calls == []


def test_a_refusal_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert place(torch.zeros(10), {1}, Kernel(answer=-1)) == set()


@pytest.fixture
def one_core(machine: Path) -> int:
    """The only core of the machine's node 1: one that this process may really run on. Node 0 has cores of nobody."""
    core = max(os.sched_getaffinity(0))
    write(machine / "sys/devices/system/node/node0/cpulist", "100000")
    write(machine / "sys/devices/system/node/node1/cpulist", core)
    return core


def cores_of_a_new_thread() -> set[int]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(os.sched_getaffinity, 0).result()


def test_threads_run_on_a_nodes_cores_until_the_end(machine: Path, one_core: int) -> None:
    before = os.sched_getaffinity(0)
    with on_cores_of({1}, machine) as at_home:
        assert at_home
        assert cores_of_a_new_thread() == {one_core}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(OSError, match="while touching"), on_cores_of({1}, machine):
        raise OSError("while touching")
    assert os.sched_getaffinity(0) == before
    with on_cores_of({0}, machine) as at_home:
        assert not at_home
        assert cores_of_a_new_thread() == before


@pytest.mark.parametrize(
    ("node", "touch_pages", "instead"),
    [
        (1, True, "pages were touched from cores there instead"),
        (0, True, "pages come from where they are first written"),
        (1, False, "pages come from where they are first written"),
    ],
)
def test_pages_that_the_system_does_not_place_are_touched_at_home(
    node: int,
    touch_pages: bool,
    instead: str,
    machine: Path,
    one_core: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, touched_from = os.sched_getaffinity(0), []

    def watched_touch(words_N: torch.Tensor, threads: int) -> None:
        touched_from.append((cores_of_a_new_thread(), threads))
        touch(words_N, threads)

    monkeypatch.setattr(host_table, "home_nodes", lambda device: {node})
    monkeypatch.setattr(host_table, "place", lambda words_N, nodes: place(words_N, nodes, Kernel(answer=-1)))
    monkeypatch.setattr(host_table, "on_cores_of", lambda nodes: on_cores_of(nodes, machine))
    monkeypatch.setattr(host_table, "touch", watched_touch)
    table = HostTable(1000, 7, touch_pages=touch_pages)
    # As many threads as this rank's share of all cores, since the machine's other ranks have other nodes' cores too.
    assert touched_from == ([({one_core} if node == 1 else before, len(before))] if touch_pages else [])
    assert os.sched_getaffinity(0) == before
    assert [record.message for record in caplog.records] == [
        f"the system places no memory on NUMA node {node} (a container needs CAP_SYS_NICE): {instead}"
    ]
    table.close()


@pytest.mark.skipif(platform.system() != "Linux", reason="asks the kernel")
def test_the_real_kernel_takes_the_arguments() -> None:
    from offload.host.memory import map_anonymous

    words = torch.frombuffer(map_anonymous(1 << 20), dtype=torch.float32)
    placed = place(words, {0})
    if not placed:
        assert ctypes.get_errno() != 22
        pytest.skip("this system allows no placement")
    words.fill_(1.0)
    maps = Path("/proc/self/numa_maps")
    if maps.exists():
        assert f"{words.data_ptr():08x} prefer" in maps.read_text()
