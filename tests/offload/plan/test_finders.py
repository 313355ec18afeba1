"""Plans made by a device, on CPU tensors: those of the CPU to the bit, on a stream and a thread of their own."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.hash import HashSpec
from kernels.hash.triton import hash_ngrams_triton
from offload.addresses import hashing
from offload.addresses.compression import CompressedVocabulary, identity_vocabulary
from offload.addresses.hashing import AddressBook
from offload.config import OffloadConfig
from offload.device import sender, streams
from offload.device.streams import HostStreams
from offload.plan import finders
from offload.plan.finders import DeviceFinder, HostFinder, open_finder
from offload.plan.plan import Plan, RowFinder, Tokens, make_plan
from offload.plan.sharding import Sharding
from offload.plan.uploads import PlanUploads
from tests.distributed import run_ranks
from tests.kernels.deduplicate.test_together import peak
from tests.offload.tables_job import Job, Outcome, open_tables, run_job, train_step
from tests.offload.test_tables import JOB, TABLES, TINY

CPU, VOCABULARY = torch.device("cpu"), 12
Case = tuple[list[Tokens], dict[str, Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Micro-batches of any shape, documents that begin anywhere, and any kind of tables."""
    batches = []
    for sequences, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=4)):
        seed = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        starts = torch.rand(sequences, length, generator=seed) < 0.3
        place = torch.arange(length).expand(sequences, length)
        positions = place - torch.where(starts, place, 0).cummax(dim=1).values if length else place
        batches.append(Tokens(torch.randint(VOCABULARY, (sequences, length), generator=seed), positions))
    orders = sorted(draw(st.sets(st.integers(1, 4), min_size=1)))
    tables = {
        "layers": draw(st.sampled_from([[0], [3, 1], [0, 1, 2]])),
        "orders": orders,
        "heads": draw(st.integers(1, 3)),
        "rows_per_head": [draw(st.sampled_from([1, 5, 50, 10**8, 2**31])) for _ in orders],
        "cross_documents": draw(st.booleans()),
    }
    return batches, tables


def book_of(tables: dict[str, Any]) -> AddressBook:
    compressed = CompressedVocabulary(torch.arange(VOCABULARY) // 2, VOCABULARY // 2, 1)
    return AddressBook(compressed, **tables)


def plan_of(finder: RowFinder, batches: list[Tokens], book: AddressBook) -> Plan:
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    rows = tuple(book.num_rows(module) for module in range(book.num_modules))
    return make_plan(batches, finder, Sharding(rows, ranks), rank, None)


def tensors_of(plan: Plan) -> list[Tensor]:
    return [plan.rows_O, *plan.tensors]


def assert_equal(plan: Plan, expected: Plan) -> None:
    for found, wanted in zip(tensors_of(plan), tensors_of(expected), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    assert plan.most_rows == expected.most_rows
    for part, other in zip(plan.modules, expected.modules, strict=True):
        assert (part.asked, part.owed, part.owned) == (other.asked, other.owed, other.owned)
        assert [index.num_rows for index in part.indices] == [index.num_rows for index in other.indices]


@contextmanager
def by_the_kernel() -> Iterator[None]:
    """Triton's interpreter hashes what a GPU would: token ids that are not compressed yet."""

    def hash_ngrams(tokens: Tensor, positions: Tensor, spec: HashSpec, *, compressed_V: Tensor | None = None) -> Tensor:
        return hash_ngrams_triton(tokens, positions, spec, compressed_V)

    with mock.patch.object(hashing, "hash_ngrams", hash_ngrams):
        yield


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), kernel=st.booleans())
def test_the_device_makes_the_plans_of_the_cpu(case: Case, kernel: bool) -> None:
    batches, tables = case
    book = book_of(tables)
    expected = plan_of(HostFinder(book), batches, book)
    if kernel:
        with by_the_kernel():
            plan = plan_of(DeviceFinder(book, CPU), batches, book)
    else:
        plan = plan_of(DeviceFinder(book, CPU), batches, book)
    assert_equal(plan, expected)


def compare_plans(examples: int) -> int:
    """Plans of random batches, of each rank others; returns how many rows were asked of this rank."""
    owed = 0
    for seed in range(examples):
        generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
        # Every third rank of every fifth step asks for nothing.
        length = 0 if (seed + dist.get_rank()) % 5 == 0 else 7
        parts = [torch.randint(VOCABULARY, (2, length), generator=generator) for _ in range(1 + seed % 3)]
        batches = [Tokens(part, torch.arange(length).expand(2, length)) for part in parts]
        rows = [[40, 30], [10**8, 2**31], [1, 3]][seed % 3]
        book = book_of({"layers": [0, 2], "orders": [1, 3], "heads": 2, "rows_per_head": rows})
        expected, plan = (plan_of(finder, batches, book) for finder in (HostFinder(book), DeviceFinder(book, CPU)))
        assert_equal(plan, expected)
        owed += sum(sum(part.owed) for part in plan.modules)
    return owed


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_owe_each_other_the_same(ranks: int) -> None:
    assert min(run_ranks(compare_plans, ranks, 9)) > 0


def run_with(job: Job, planner: str, **changes: Any) -> Outcome:
    config = TABLES["adam-exact"].model_copy(update={"planner": planner, "window_rows": TINY, **changes})
    with mock.patch.object(finders, "_PLANNING", ("cpu",)):
        return run_job(job, config)


def run_with_both(job: Job, depth: int) -> list[Outcome]:
    return [run_with(job, planner, depth=depth) for planner in ("cpu", "device")]


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_have_the_same_bits_whoever_plans(ranks: int, depth: int) -> None:
    for by_cpu, by_device in run_ranks(run_with_both, ranks, JOB, depth):
        assert by_cpu.digest == by_device.digest
        assert by_cpu.written_back > 0


def test_the_plans_of_a_device_pass_verification() -> None:
    assert run_with(JOB, "device", verify=True).digest == run_with(JOB, "cpu").digest


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_planning_is_the_cpus_unless_the_device_is_asked_for(device: str) -> None:
    book = book_of({"layers": [0], "orders": [1], "heads": 1, "rows_per_head": 5})
    assert isinstance(open_finder("auto", book, torch.device(device)), HostFinder)


def test_a_device_that_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^offload\.planner=device needs a GPU, but the model is on cpu: set it to auto$"
    ):
        open_tables(JOB, OffloadConfig(planner="device"))


def test_a_token_outside_the_vocabulary_is_told_as_by_the_cpu() -> None:
    book = AddressBook(identity_vocabulary(10, pad_id=0), layers=[0], orders=[1], heads=1, rows_per_head=5)
    batch = Tokens(torch.tensor([[1, 10]]), torch.tensor([[0, 1]]))
    for finder in (HostFinder(book), DeviceFinder(book, CPU)):
        with pytest.raises(ValueError, match="token id 10 is outside the vocabulary of 10 ids"):
            finder.of_batches([batch])


class _Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> "_Stream":
        return self

    def wait_event(self, event: "_Stream") -> None:
        if event.name != self.name:
            self.log.append(f"{self.name} waits for {event.name}")

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.log.append(f"{threading.current_thread().name} waits for {self.name}")


class _Device(HostStreams):
    """A device whose memory is another than the host's: tells by which stream each tensor was made."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._local = threading.local()
        self._new = 0

    def new(self) -> Any:
        self._new += 1
        return _Stream(f"stream {self._new}", self.log)

    def current(self) -> Any:
        return getattr(self._local, "stream", _Stream("model", self.log))

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        before, self._local.stream = self.current(), stream
        yield
        self._local.stream = before


class _Streamed(TorchDispatchMode):
    def __init__(self, device: _Device) -> None:
        super().__init__()
        self._device, self.operations = device, Counter[str]()

    def __torch_dispatch__(self, operation: Any, _types: object, arguments: Any = (), options: Any = None) -> Any:
        if operation is torch.ops.aten.sort.stable or operation is torch.ops.aten.clone.default:
            self.operations[self._device.current().name] += 1
        return operation(*arguments, **(options or {}))


def test_the_device_works_on_a_stream_of_the_finders_and_is_done_when_it_returns() -> None:
    book = book_of({"layers": [0], "orders": [1, 2], "heads": 2, "rows_per_head": 50})
    device = _Device()
    batch = Tokens(torch.arange(VOCABULARY)[None], torch.arange(VOCABULARY)[None])
    with mock.patch.object(finders, "streams_of", return_value=device):
        finder = DeviceFinder(book, CPU)
    with _Streamed(device) as streamed:
        ((unique_U, _),) = finder.of_batches([batch])
        finder.owed(unique_U, 2)
    assert [*streamed.operations] == ["stream 1"]
    waits = "MainThread waits for stream 1"
    assert device.log == [waits] * 4, "for unique rows and for all of it, in either call"


def test_nobody_but_the_planners_thread_waits_for_a_plan() -> None:
    device = _Device()
    with mock.patch.object(finders, "streams_of", return_value=device):
        read = {planner: numbers_read_by_the_loop(planner) for planner in ("cpu", "device")}
    assert {line.partition(" waits")[0] for line in device.log} == {"engram-plan_0"}
    assert read["device"] == read["cpu"] > 0


def numbers_read_by_the_loop(planner: str) -> int:
    with mock.patch.object(finders, "_PLANNING", ("cpu",)):
        tables = open_tables(JOB, OffloadConfig.model_validate({"planner": planner}))
    try:
        with _Numbers() as numbers:
            for step in range(4):
                train_step(tables, JOB, step)
    finally:
        tables.close()
    return numbers.count


class _Numbers(TorchDispatchMode):
    """Counts numbers that are read from tensors by this thread alone."""

    count = 0

    def __torch_dispatch__(self, operation: Any, _types: object, arguments: Any = (), options: Any = None) -> Any:
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*arguments, **(options or {}))


def test_what_the_device_made_is_not_uploaded_but_lent_to_the_model() -> None:
    book = book_of({"layers": [0, 1], "orders": [1, 2], "heads": 2, "rows_per_head": 50})
    batches = [Tokens(torch.arange(VOCABULARY)[None], torch.arange(VOCABULARY)[None])] * 2
    with lending() as lent:
        uploads = PlanUploads(CPU)
    plan = uploads.pin(plan_of(DeviceFinder(book, CPU), batches, book))
    uploads.send(3, plan)
    made = [tensor.data_ptr() for tensor in tensors_of(plan)[1:]]
    for take in (lambda: uploads.take(3, plan), lambda: uploads.now(plan)):
        there = take()
        assert [tensor.data_ptr() for tensor in tensors_of(there)[1:]] == made
        assert lent == made
        lent.clear()


def test_evaluation_borrows_what_the_device_made_too() -> None:
    with mock.patch.object(finders, "_PLANNING", ("cpu",)), lending() as lent:
        tables = open_tables(JOB, OffloadConfig(planner="device"))
        try:
            rows = tables.look_up(JOB.batches(0, 0, 1))
        finally:
            tables.close()
    parts = {part.data_ptr() for batch in rows.indices for index in batch for part in index.tensors}
    assert parts <= set(lent)


@contextmanager
def lending() -> Iterator[list[int]]:
    """Addresses of the tensors that senders lend to the stream that takes them."""
    lent: list[int] = []

    class Lending(HostStreams):
        def lend(self, tensor: Tensor) -> None:
            lent.append(tensor.data_ptr())

    with mock.patch.object(sender, "streams_of", return_value=Lending()):
        yield lent


def test_a_gpus_tensors_are_not_pinned() -> None:
    tensor = mock.Mock(is_cuda=True)
    assert streams.CudaStreams.pin(mock.Mock(), tensor) is tensor
    tensor.is_cuda = False
    assert streams.CudaStreams.pin(mock.Mock(), tensor) is tensor.pin_memory.return_value


@pytest.mark.parametrize(("rows", "of_step", "of_module"), [(10**8, 4, 84), (2**32, 8, 92)])
def test_a_device_takes_no_more_memory_than_it_says(rows: int, of_step: int, of_module: int) -> None:
    tables = {"layers": [0, 1], "orders": [2, 3], "heads": 4, "rows_per_head": rows}
    book = AddressBook(identity_vocabulary(1 << 17, pad_id=0), **tables)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1 << 17, (4, 2, 512), generator=generator)
    batches = [Tokens(tokens, torch.arange(512).expand(2, 512)) for tokens in drawn]
    finder, lookups = DeviceFinder(book, CPU), 4 * 2 * 512 * 8
    kept = 16 + 8  # the first module's indices, and its rows, which are on the host
    with peak() as bytes_taken:
        finder.of_batches(batches)
    said = of_step * 2 + of_module + kept
    assert said - 8 < bytes_taken() / lookups < said + 1


@pytest.mark.gpu
def test_a_gpu_makes_the_plans_of_the_cpu() -> None:
    tables = {"layers": [0, 1], "orders": [2, 3], "heads": 8, "rows_per_head": 100_000}
    book = AddressBook(identity_vocabulary(1 << 17, pad_id=0), **tables)  # type: ignore[arg-type]
    drawn = torch.randint(1 << 17, (4, 8, 1024), generator=torch.Generator().manual_seed(0)) >> 7
    batches = [Tokens(tokens, torch.arange(1024).expand(8, 1024)) for tokens in drawn]
    finder = DeviceFinder(book, torch.device("cuda:0"))
    for _ in range(3):
        plan = plan_of(finder, batches, book)
        assert all(tensor.is_cuda for tensor in tensors_of(plan)[1:])
        assert_equal(plan.map(Tensor.cpu), plan_of(HostFinder(book), batches, book))
