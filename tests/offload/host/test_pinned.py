"""Host memory registered chunk by chunk: whatever fails, nothing stays registered, and one line says why."""

import contextlib
import gc
import mmap
import re
import resource
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.host import pinned as pinned_memory
from offload.host import table as host_table
from offload.host.memory import map_anonymous
from offload.host.pinned import CudaDriver, PinError, PinnedMemory
from offload.host.table import HostTable

CHUNK = mmap.PAGESIZE
CPU = torch.device("cpu")
NAMES = {1: "CUDA_ERROR_INVALID_VALUE", 2: "CUDA_ERROR_OUT_OF_MEMORY", 4: "CUDA_ERROR_DEINITIALIZED"}
NAMES |= {304: "CUDA_ERROR_OPERATING_SYSTEM", 712: "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"}
NAMES |= {801: "CUDA_ERROR_NOT_SUPPORTED"}


class FakeDriver:
    """Keeps books of what is registered, and fails where it is told to."""

    def __init__(self, fail: dict[tuple[str, int], int] | None = None, shifts: dict[int, int] | None = None) -> None:
        self.fail, self.shifts = fail or {}, shifts or {}
        self.registered: dict[int, int] = {}
        self.mapped_while_registered: list[bool] = []
        self.calls = {"register": 0, "unregister": 0, "device_pointer": 0}

    def register(self, address: int, nbytes: int) -> int:
        if code := self._code("register"):
            return code
        first, last = address // CHUNK, (address + nbytes - 1) // CHUNK
        if not self.registered_pages.isdisjoint(range(first, last + 1)):
            return 712
        self.registered[address] = nbytes
        return 0

    @property
    def registered_pages(self) -> set[int]:
        spans = (range(start // CHUNK, -(-(start + size) // CHUNK)) for start, size in self.registered.items())
        return {page for span in spans for page in span}

    def unregister(self, address: int) -> int:
        self.mapped_while_registered.append(is_mapped(address))
        del self.registered[address]
        return self._code("unregister")

    def device_pointer(self, address: int) -> tuple[int, int]:
        assert address in self.registered
        number = self.calls["device_pointer"]
        return self._code("device_pointer"), address + self.shifts.get(number, 0)

    def name(self, code: int) -> str:
        return NAMES[code]

    def _code(self, call: str) -> int:
        number, self.calls[call] = self.calls[call], self.calls[call] + 1
        return self.fail.get((call, number), 0)


def is_mapped(address: int) -> bool:
    bounds = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(first, 16) <= address < int(last, 16) for first, last in bounds)


def words(chunks: float) -> torch.Tensor:
    return torch.frombuffer(map_anonymous(int(chunks * CHUNK)), dtype=torch.float32)


def test_memory_is_registered_in_chunks_and_given_back_once() -> None:
    driver, memory = FakeDriver(), words(2.5)
    pinned = PinnedMemory(memory, driver, CHUNK)
    start = memory.data_ptr()
    assert driver.registered == {start: CHUNK, start + CHUNK: CHUNK, start + 2 * CHUNK: CHUNK // 2}
    assert pinned.pointer == start
    pinned.close()
    pinned.close()
    assert driver.registered == {}
    assert driver.calls["unregister"] == 3


def test_no_registration_is_larger_than_drivers_take() -> None:
    assert pinned_memory.CHUNK_BYTES == 4 << 30
    driver = FakeDriver()
    PinnedMemory(words(3), driver)
    assert driver.calls["register"] == 1


class MeetingDriver(FakeDriver):
    """Lets nobody register before as many threads as there are to be want to."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._barrier, self._lock = threading.Barrier(threads), threading.Lock()
        self.threads: set[int] = set()

    def register(self, address: int, nbytes: int) -> int:
        self.threads.add(threading.get_ident())
        self._barrier.wait(timeout=20)
        with self._lock:
            return super().register(address, nbytes)


def test_threads_register_side_by_side_and_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "_TELL_EVERY_S", 0.0)
    driver, told = MeetingDriver(3), []
    pinned = PinnedMemory(memory := words(5.5), driver, CHUNK, threads=3, tell=told.append)
    assert len(driver.threads) == 3
    assert sorted(driver.registered.values()) == [CHUNK // 2, *[CHUNK] * 5]
    assert pinned.pointer == memory.data_ptr()
    assert told[::5] == [
        "locking host memory for the GPU: 4.00 KiB of 22.00 KiB",
        "locking host memory for the GPU: 22.00 KiB of 22.00 KiB",
    ]
    pinned.close()
    assert driver.registered == {}


def test_a_table_is_pinned_by_this_ranks_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory.torch, "as_tensor", same_memory)
    monkeypatch.setattr(host_table, "PinnedMemory", partial(PinnedMemory, chunk_bytes=CHUNK))
    monkeypatch.setattr(host_table, "usable_cores", lambda: 9)
    monkeypatch.setattr(host_table, "local_ranks", lambda: 3)
    driver, table = MeetingDriver(3), HostTable(6 * CHUNK // 4, 1)
    table.pin(driver, CPU)
    assert len(driver.threads) == 3
    table.close()


def test_a_failure_of_one_thread_undoes_what_the_others_registered() -> None:
    driver = FakeDriver({("register", 4): 2})
    with pytest.raises(PinError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        PinnedMemory(words(50), driver, CHUNK, threads=4)
    assert driver.registered == {}
    assert driver.calls["register"] <= 8, "threads went on after all was lost"


def test_every_thread_calls_the_driver_in_the_gpus_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the driver refuses, and a thread begins without one."""
    contexts = threading.local()

    class Library:
        def cuCtxGetCurrent(self, context: Any) -> int:
            context._obj.value = 77
            return 0

        def cuCtxPushCurrent_v2(self, context: Any) -> int:
            contexts.stack = [*getattr(contexts, "stack", []), context.value]
            return 0

        def cuCtxPopCurrent_v2(self, context: Any) -> int:
            context._obj.value = contexts.stack.pop()
            return 0

        def cuMemHostRegister_v2(self, *args: Any) -> int:
            return 0 if getattr(contexts, "stack", []) == [77] else 201

        def cuMemHostGetDevicePointer_v2(self, pointer: Any, address: Any, flags: Any) -> int:
            pointer._obj.value = address.value
            return self.cuMemHostRegister_v2()

        def cuMemHostUnregister(self, address: Any) -> int:
            return self.cuMemHostRegister_v2()

    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)
    monkeypatch.setattr("torch.cuda.device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(pinned_memory.ctypes, "CDLL", lambda name: Library())
    pinned = PinnedMemory(words(5), CudaDriver(torch.device("cuda", 0)), CHUNK, threads=2)
    pinned.close()
    assert contexts.stack == []


def test_chunks_that_share_a_page_are_refused_before_the_driver_does() -> None:
    driver, memory = FakeDriver(), words(3)
    for part, chunk in ((memory[16:], CHUNK), (memory, CHUNK + 64)):
        with pytest.raises(ValueError, match=rf"^memory at {part.data_ptr():#x} in chunks of {chunk} bytes is not "):
            PinnedMemory(part, driver, chunk)
    assert driver.calls["register"] == 0


@pytest.mark.parametrize("call", ["register", "device_pointer"])
@pytest.mark.parametrize("chunk", [0, 2, 4])
def test_a_failure_half_way_undoes_what_was_registered(call: str, chunk: int) -> None:
    driver = FakeDriver({(call, chunk): 2})
    with pytest.raises(PinError, match="CUDA_ERROR_OUT_OF_MEMORY") as caught:
        PinnedMemory(words(5), driver, CHUNK)
    assert driver.registered == {}
    assert driver.calls["register"] == chunk + 1
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (1, "registering 4.00 KiB of 8.00 KiB of host memory for the GPU failed with CUDA_ERROR_INVALID_VALUE: the "
            "memory is of a kind that cannot be locked, such as a file's; or set offload.engine=staged, which needs "
            "no locked tables"),
        (2, "CUDA_ERROR_OUT_OF_MEMORY: the machine leaves too little memory that can be locked; or the "
            "process's limit RLIMIT_MEMLOCK of 8.00 MiB counts here: raise it (ulimit -l unlimited), or start the "
            "container with --ulimit memlock=-1; or set"),
        (4, "failed with CUDA_ERROR_DEINITIALIZED: set offload.engine=staged, which needs no locked tables"),
        (304, "does not let this process lock so much memory; "
              "or the process's limit RLIMIT_MEMLOCK of 8.00 MiB counts"),
        (801, "driver does not support it, as under WSL; or set offload.engine=staged"),
    ],
)  # fmt: skip
def test_the_message_says_what_failed_and_what_to_do(code: int, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (8 << 20, 8 << 20))
    with pytest.raises(PinError, match=re.escape(hint)):
        PinnedMemory(words(2), FakeDriver({("register", 0): code}), CHUNK)


def test_the_limit_on_locked_memory_is_named_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with pytest.raises(PinError, match=r"too little memory that can be locked; or set offload.engine=staged"):
        PinnedMemory(words(2), FakeDriver({("register", 0): 2}), CHUNK)


def test_memory_that_the_gpu_sees_in_pieces_is_refused() -> None:
    driver = FakeDriver(shifts={1: 1 << 20})
    with pytest.raises(PinError, match=r"does not see 12.00 KiB of host memory as one piece"):
        PinnedMemory(words(3), driver, CHUNK)
    assert driver.registered == {}
    # A system that gives the GPU addresses of its own is fine as long as they follow each other.
    shifted = PinnedMemory(words(2), FakeDriver(shifts={0: 1 << 20, 1: 1 << 20}), CHUNK)
    assert shifted.pointer == shifted._words_N.data_ptr() + (1 << 20)


def test_a_chunk_that_cannot_be_given_back_does_not_keep_the_others() -> None:
    driver = FakeDriver({("unregister", 0): 4})
    pinned = PinnedMemory(words(3), driver, CHUNK)
    with pytest.raises(PinError, match=r"^unregistering 12.00 KiB of host memory failed with CUDA_ERROR_DEINITIALIZED"):
        pinned.close()
    assert driver.registered == {}


def test_a_registration_that_nobody_closes_ends_with_its_owner() -> None:
    driver = FakeDriver()
    pinned = PinnedMemory(words(2), driver, CHUNK)
    del pinned
    gc.collect()
    assert driver.registered == {}


def same_memory(array: object, device: torch.device) -> torch.Tensor:
    assert isinstance(array, pinned_memory._CudaArray)
    interface = array.__cuda_array_interface__
    assert interface["data"] == (array._words_N.data_ptr(), False)
    assert interface["shape"] == tuple(array._words_N.shape)
    return array._words_N


def test_a_table_is_unregistered_before_its_memory_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory.torch, "as_tensor", same_memory)
    driver, table = FakeDriver(), HostTable(1000, 7, touch_pages=True)
    view = table.pin(driver, CPU)
    assert (view.data_ptr(), view.shape) == (table.records_RW.data_ptr(), (1000, 7))
    assert len(driver.registered) == 1
    del view
    table.close()
    assert driver.registered == {}
    assert driver.mapped_while_registered == [True]
    assert table.device_RW is None
    table.close()


def test_a_copy_in_place_of_a_view_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory.torch, "as_tensor", lambda array, device: same_memory(array, device).clone())
    driver, table = FakeDriver(), HostTable(10, 7)
    with pytest.raises(PinError, match=r"^the GPU's view of the tables is at 0x\w+ on cpu, but the memory is at 0x"):
        table.pin(driver, CPU)
    assert driver.registered == {}
    assert table.device_RW is None


def test_an_empty_shard_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory.torch, "as_tensor", same_memory)
    table = HostTable(0, 7)
    assert table.pin(FakeDriver(), CPU).shape == (0, 7)
    table.close()


@pytest.mark.gpu
def test_what_one_side_writes_the_other_reads() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    table = HostTable(100_000, 61, touch_pages=True, device=device)
    view = table.pin(CudaDriver(device), device)
    assert table.records_RW.is_pinned()
    assert (view.device, view.shape) == (device, table.records_RW.shape)
    attributes = view.data_ptr(), table.records_RW.data_ptr()
    table.records_RW[12_345] = 3.0
    assert torch.equal(view[12_345].clone(), torch.full((61,), 3.0, device=device))
    view[99_999].fill_(5.0)
    torch.cuda.synchronize()
    assert torch.equal(table.records_RW[99_999], torch.full((61,), 5.0))
    assert int(table.records_RW.count_nonzero()) == 2 * 61
    assert attributes[0] == attributes[1], "a GPU of today sees host memory where the host does"
    del view
    table.close()
    assert not table.records_RW.is_pinned()


@pytest.mark.gpu
def test_real_memory_in_many_chunks_is_one_piece() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = torch.frombuffer(map_anonymous(4 << 22), dtype=torch.float32)
    pinned = PinnedMemory(memory, CudaDriver(device), 1 << 20)
    view = pinned.view(device)
    view.copy_(torch.arange(len(memory), device=device))
    torch.cuda.synchronize()
    assert torch.equal(memory, torch.arange(len(memory), dtype=torch.float32))
    del view
    pinned.close()


@pytest.mark.gpu
def test_a_real_failure_leaves_no_error_behind_for_later_launches() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    memory = torch.frombuffer(map_anonymous(4 << 20), dtype=torch.float32)
    first = PinnedMemory(memory, CudaDriver(device))
    with pytest.raises(PinError, match="ALREADY_REGISTERED: a part of it is registered already"):
        PinnedMemory(memory, CudaDriver(device))
    assert float(torch.ones(4, device=device).sum()) == 4.0
    first.close()
