"""The engines that carry records are interchangeable: the same bits. `auto` takes the faster one that works here."""

import contextlib
import random
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tests.kernels.conftest  # noqa: F401 - loops in Triton's interpreter
from kernels.records import fresh_triton
from kernels.records import triton as records_triton
from offload.config import LinkConfig, OffloadConfig
from offload.device.streams import Event, HostStreams
from offload.host.pinned import PinError
from offload.host.table import HostTable
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.rows.shard import Shard
from offload.transfers import open as transfers
from offload.transfers import staged as transfers_staged
from offload.transfers import zero_copy as transfers_zero_copy
from offload.transfers.agreement import Ranks, fastest
from offload.transfers.loads import Launches, Products
from offload.transfers.open import open_transfers, pins
from offload.transfers.staged import StagedTransfers
from offload.transfers.trial import Trial
from offload.transfers.zero_copy import ZeroCopyTransfers
from tests.distributed import run_ranks
from tests.grid import grid
from tests.offload.host.test_pinned import FakeDriver, same_memory
from tests.offload.tables_job import Job, open_tables, run_job, run_jobs
from tests.offload.test_tables import JOB, TABLES, TINY

CPU = torch.device("cpu")
WINDOWS = [{"depth": depth, "window_rows": window} for depth, window in ((0, TINY), (1, TINY), (4, TINY), (2, 1000))]


def configs(base: OffloadConfig, engine: str) -> list[OffloadConfig]:
    return [base.model_copy(update={"engine": engine, **window}) for window in WINDOWS]


def pad_as_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records on a CPU lie as they do for a GPU, each at the start of a line."""
    monkeypatch.setattr(RecordLayout, "stride", lambda layout, device: 32)


NAMES = ["adam-exact", "adam-exact-bf16", "adam-exact-bf16-state", "rmsprop-exact-bf16-both"]


@pytest.mark.parametrize(
    ("update", "name"),
    grid([{"mode": "resident"}, {"engine": "cpu"}, {"engine": "staged"}, {"host_file": ""}, {"verify": True}], NAMES),
)
def test_padding_changes_no_bits(
    name: str, update: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Those that a checkpoint has, either."""
    update = update | ({"host_file": str(tmp_path)} if "host_file" in update else {})
    config = TABLES[name].model_copy(update={"depth": 2, "window_rows": TINY, **update})
    plain = run_job(JOB, config)
    pad_as_for_a_gpu(monkeypatch)
    with contextlib.closing(open_tables(JOB, config)) as tables:
        assert tables._shard.store.records.stride(0) == 32 > tables._shard.layout.words
        assert tables.window_bytes == len(tables._shard.store.records) * 128
    assert run_job(JOB, config).digest == plain.digest


@pytest.mark.parametrize(("name", "engine"), grid(NAMES, ["zero_copy", "staged", "mixed"]))
def test_every_engine_has_the_bits_of_a_resident_shard(name: str, engine: str) -> None:
    resident = run_job(JOB, TABLES[name].model_copy(update={"mode": "resident"}))
    for config in configs(TABLES[name], engine):
        outcome = run_job(JOB, config)
        assert outcome.digest == resident.digest, config
        assert outcome.written_back > 0 or config.window_rows > TINY, (
            "no row went to the host: the test would prove nothing"
        )


def test_staged_is_exact_however_late_and_torn_its_chunks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that pause at random between chunks of three rows, one direction slower than the other."""
    resident = run_job(JOB, TABLES["adam-exact"].model_copy(update={"mode": "resident"}))
    monkeypatch.setattr(transfers_staged, "_CHUNK_BYTES", 3 * 19 * 4)
    for seed, (fetch_s, write_back_s) in enumerate([(0.002, 0.0), (0.0, 0.002), (0.001, 0.001)]):
        chance = random.Random(seed)
        with monkeypatch.context() as patches:
            for name, longest_s in (("_next", fetch_s), ("_Chunk.wait", write_back_s)):
                owner, _, call = name.rpartition(".")
                late = _late(transfers_staged._Chunk if owner else transfers_staged, call, chance, longest_s)
                patches.setattr(f"offload.transfers.staged.{name}", late)
            outcome = run_job(JOB, OffloadConfig(engine="staged", depth=2, window_rows=TINY))
        assert outcome.digest == resident.digest


def _late(owner: Any, name: str, chance: random.Random, longest_s: float) -> Callable[..., Any]:
    call = getattr(owner, name)

    def late(*args: Any) -> Any:
        time.sleep(longest_s * chance.choice((0, 0, 0.1, 1)))
        return call(*args)

    return late


def test_two_ranks_have_the_same_bits_under_every_engine() -> None:
    base = TABLES["adam-exact"].model_copy(update=WINDOWS[2])
    engines = [base.model_copy(update={"engine": engine}) for engine in ("cpu", "zero_copy", "staged", "mixed")]
    for outcomes in run_ranks(run_jobs, 2, [(JOB, config) for config in engines]):
        assert len({outcome.digest for outcome in outcomes}) == 1


def test_staged_gives_the_same_bits_from_a_file(tmp_path: Any) -> None:
    config = OffloadConfig(engine="staged", depth=1, window_rows=TINY)
    in_file = config.model_copy(update={"host_file": str(tmp_path)})
    assert run_job(JOB, in_file).digest == run_job(JOB, config).digest


@pytest.mark.parametrize(
    ("name", "padded"), grid(["adam-exact", "adam-exact-bf16", "adam-exact-bf16-state"], [True, False])
)
def test_the_kernels_of_zero_copy_give_the_bits_of_a_resident_shard(
    name: str, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine as on a GPU, with its kernels in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    for on_gpu in (records_triton.fetch_records, records_triton.write_records, fresh_triton.draw_records):
        monkeypatch.setattr(transfers_zero_copy, on_gpu.__name__, on_gpu)
    job = Job(steps=6, skipped=(3,), evaluate=True)
    base = TABLES[name]
    resident = run_job(job, base.model_copy(update={"mode": "resident"}))
    if padded:
        pad_as_for_a_gpu(monkeypatch)
    outcome = run_job(job, base.model_copy(update={"engine": "zero_copy", "depth": 2, "window_rows": TINY}))
    assert outcome.digest == resident.digest
    assert outcome.written_back > 0, "no row went to the host: the test would prove nothing"


def shard(num_rows: int = 300) -> Shard:
    layout = RecordLayout(6, 12)
    return Shard(Sharding((num_rows - 100, 100), 1), 0, layout, RowInit(3, 0.02))


@pytest.mark.parametrize("count", [0, 1, 40, 300])
@pytest.mark.parametrize("engine", [ZeroCopyTransfers, StagedTransfers])
def test_records_arrive_whole_in_chunks_of_any_size(engine: type, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers_staged, "_CHUNK_BYTES", 7 * 19 * 4)
    rows_of = shard()
    host_RW = torch.randn(300, 19)
    window_CW = torch.randn(300, 19)
    before_CW, expected_RW = window_CW.clone(), host_RW.clone()
    carrier = engine(host_RW, window_CW, rows_of, HostStreams())
    rows, slots = torch.randperm(300)[:count], torch.randperm(300)[:count]
    drawn = rows[2 * count // 3 :]
    # Whatever host memory and slot hold of them.
    expected_RW[drawn] = 0.0
    rows_of.fill(expected_RW, torch.arange(300))
    fetch = carrier.fetch(rows, slots, count - len(drawn))
    fetch.order()
    fetch.wait()
    assert fetch.done()
    assert torch.equal(window_CW[slots], expected_RW[rows])
    before_CW[slots] = window_CW[slots]
    assert torch.equal(window_CW, before_CW), "other slots were written"
    window_CW += 1.0
    before_RW = host_RW.clone()
    carrier.write_back(slots, rows).wait()
    before_RW[rows] = window_CW[slots]
    assert torch.equal(host_RW, before_RW)
    carrier.close()


def test_a_fetch_that_fails_is_told_where_it_is_waited_for() -> None:
    carrier = StagedTransfers(torch.zeros(300, 19), torch.zeros(4, 19), shard(), HostStreams())
    fetch = carrier.fetch(torch.arange(3), torch.arange(2, 5), 3)  # there is no slot 4
    with pytest.raises(IndexError, match="out of"):
        fetch.order()
    carrier.close()


class SlowEngine:
    """Copies nothing, and takes its time for it: so many seconds to be waited for, in and out."""

    def __init__(self, name: str, seconds: float, out_s: float | None = None) -> None:
        self.name, self.closed = name, False
        self._in_s, self._out_s = seconds, seconds if out_s is None else out_s
        self.fetched = self.written = self.waited = 0

    def fetch(self, rows: torch.Tensor, slots: torch.Tensor, stored: int) -> "SlowCopy":
        assert len(rows) == len(slots)
        self.fetched += stored
        return SlowCopy(self, self._in_s)

    def write_back(self, slots: torch.Tensor, rows: torch.Tensor) -> "SlowCopy":
        self.written += len(slots)
        return SlowCopy(self, self._out_s)

    def close(self) -> None:
        self.closed = True


@dataclass
class SlowCopy:
    engine: SlowEngine
    seconds: float

    def wait(self) -> None:
        self.engine.waited += 1
        time.sleep(self.seconds)


def nothing() -> Event:
    return HostStreams().current().record_event()


@pytest.mark.parametrize("faster", ["zero_copy", "mixed", "staged"])
def test_engines_are_timed_both_ways_and_the_fastest_is_taken(faster: str) -> None:
    engines = [SlowEngine(name, 0.0 if name == faster else 0.02) for name in ("zero_copy", "mixed", "staged")]
    chosen, seconds = fastest(engines, Trial(1000, torch.zeros(50, 19)), Ranks(1, None), [nothing])
    assert chosen.name == faster
    assert all(engine.fetched == engine.written >= 3 * 25 for engine in engines)
    assert min(seconds) == seconds[engines.index(chosen)]
    assert max(seconds) > 0.04 / (25 * 19 * 4 / 1e9)


def test_what_is_measured_leaves_the_tables_as_they_are() -> None:
    host_RW, window_CW = torch.randn(300, 19), torch.zeros(50, 19)
    before_RW = host_RW.clone()
    engine = ZeroCopyTransfers(host_RW, window_CW, shard(), HostStreams())
    fastest([engine], Trial(300, window_CW), Ranks(1, None), [nothing])
    assert torch.equal(host_RW, before_RW)
    assert torch.equal(window_CW, host_RW[::6])


@pytest.mark.parametrize(("rows", "slots"), [(0, 0), (1, 50), (300, 1), (2, 2)])
def test_a_trial_of_hardly_any_rows(rows: int, slots: int) -> None:
    engine = ZeroCopyTransfers(torch.zeros(rows, 19), torch.zeros(slots, 19), shard(), HostStreams())
    _, (seconds,) = fastest([engine], Trial(rows, torch.zeros(slots, 19)), Ranks(1, None), [nothing])
    assert seconds > 0


def test_each_load_beside_copies_counts() -> None:
    """What ends late under the faster copy makes it the slower one, whichever of the loads that is."""

    def late() -> Event:
        if not engines[1].waited:  # the first is still measured
            time.sleep(0.05)
        return nothing()

    trial, ranks = Trial(50, torch.zeros(50, 19)), Ranks(1, None)
    for loads, faster in (([nothing, late], "slow"), ([late, nothing], "slow"), ([nothing, nothing], "quick")):
        engines = [SlowEngine("quick", 0.0), SlowEngine("slow", 0.01)]
        assert fastest(engines, trial, ranks, loads)[0].name == faster


def test_copies_are_under_way_while_a_load_is_launched() -> None:
    """A loop whose thread an engine's own Python holds up would not show it afterwards."""
    engine, seen = SlowEngine("slow", 0.0), []

    def load() -> Event:
        seen.append((engine.fetched, engine.written, engine.waited))
        return nothing()

    trial = Trial(50, torch.zeros(50, 19))
    trial.seconds(engine, load)
    assert seen == [(25, 25, 0)]
    assert engine.waited == 2


def test_products_and_launches_are_as_many_as_they_are_told_to_be() -> None:
    products, launches = Products(HostStreams(), CPU, size=8, count=2), Launches(HostStreams(), CPU, count=3)
    with mock.patch.object(torch, "mm", wraps=torch.mm) as product:
        products().synchronize()
    assert product.call_count == 2
    assert torch.equal(products._product, products._factor @ products._factor)
    launches().synchronize()
    assert launches._number == 3


def test_a_limit_on_locked_memory_does_not_refuse_what_the_driver_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's driver does not look at it, and containers begin with a low one."""
    real = resource.getrlimit
    monkeypatch.setattr(
        "resource.getrlimit", lambda which: (8192, 8192) if which == resource.RLIMIT_MEMLOCK else real(which)
    )
    monkeypatch.setattr("offload.window.store.pins", lambda config, device: True)
    outcome = run_job(Job(steps=6), OffloadConfig(engine="zero_copy", window_rows=TINY))
    assert outcome.fetched > 0


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


def choose(
    config: OffloadConfig,
    driver: FakeDriver,
    zero_copy_s: float = 0.0,
    world_size: int = 1,
    out_s: float | None = None,
    programs_s: dict[int, float] | None = None,
) -> tuple[str, list[str]]:
    """Opens an engine for a window that seems to be on a GPU; returns the name of the chosen one, and what was told.

    Staged takes 0.01 s each way, zero_copy `zero_copy_s` in and `out_s` out. With `programs_s`, zero_copy takes as long
    as it says of its programs, and the name says their number.
    """
    told: list[str] = []
    host, opened = HostTable(300, 19), []

    def zero_copy(*args: Any) -> SlowEngine:
        name, seconds = (f"zero_copy {args[-1]}", programs_s[args[-1]]) if programs_s else ("zero_copy", zero_copy_s)
        opened.append(engine := SlowEngine(name, seconds, out_s))
        return engine

    def staged(*args: Any) -> SlowEngine:
        opened.append(engine := SlowEngine("staged", 0.01))
        return engine

    with ExitStack() as stack:
        for name, value in (
            ("streams_of", lambda device: HostStreams()),
            ("StagedTransfers", staged),
            ("ZeroCopyTransfers", zero_copy),
            ("Products", lambda *args: nothing),
            ("Launches", lambda *args: nothing),
        ):
            stack.enter_context(mock.patch.object(transfers, name, value))
        stack.enter_context(mock.patch("offload.host.pinned.torch.as_tensor", same_memory))
        pin = HostTable.pin
        stack.enter_context(mock.patch.object(host, "pin", lambda driver, device, tell: pin(host, driver, CPU, tell)))
        try:
            window, ranks = torch.zeros(50, 19).as_subclass(OnGpu), Ranks(world_size, None)
            chosen = open_transfers(config, host, window, shard(), ranks, lambda device: driver, tell=told.append)
            assert bool(driver.registered) == (chosen.name != "staged"), "pinned for nothing"
            used = [engine for engine in opened if not engine.closed]
            assert len(used) == 2 if chosen.name == "mixed" else used == [chosen]
            chosen.close()
            assert all(engine.closed for engine in opened)
            return chosen.name, told
        finally:
            host.close()
            assert driver.registered == {}


@pytest.mark.parametrize("engine", ["auto", "zero_copy"])
def test_programs_are_measured_beside_products_unless_the_config_says_them(engine: str) -> None:
    seconds = {4: 0.0, 8: 0.002, 16: 0.004}
    name, told = choose(OffloadConfig(engine=engine), FakeDriver(), programs_s=seconds)
    assert name == "zero_copy 4"
    assert told[0].startswith("offload.programs: 4 (measured beside products, ms a GB each way: 8 ")
    assert len(told) == (2 if engine == "auto" else 1)
    name, told = choose(OffloadConfig(engine=engine, programs=16), FakeDriver(), programs_s=seconds)
    assert name == "zero_copy 16"
    assert not any("offload.programs" in line for line in told)


def programs_of_two() -> list[str]:
    """What two ranks take, of which one would take 4 programs, but the other is slowest with them; or cannot pin."""
    rank = dist.get_rank()
    seconds = ({4: 0.0, 8: 0.004, 16: 0.012}, {4: 0.02, 8: 0.004, 16: 0.0})[rank]
    config = OffloadConfig(engine="zero_copy")
    alone = choose(config, FakeDriver(), programs_s=seconds)[0]
    assert alone == f"zero_copy {(4, 16)[rank]}", "the test would prove nothing"
    together = choose(config, FakeDriver(), world_size=2, programs_s=seconds)[0]
    refusing = FakeDriver({("register", 0): 2} if rank == 1 else {})
    with pytest.raises(PinError, match=("another rank cannot pin its tables", "CUDA_ERROR")[rank]):
        choose(config, refusing, world_size=2)
    return [together]


def test_ranks_agree_on_programs_and_fail_together() -> None:
    assert run_ranks(programs_of_two, 2) == [["zero_copy 8"]] * 2


def chosen_by_two() -> list[str]:
    """What two ranks take, of which the second finds zero_copy too slow, slower, or impossible."""
    rank, config = dist.get_rank(), OffloadConfig()
    refusing = FakeDriver({("register", 0): 2} if rank == 1 else {})
    alone = choose(config, FakeDriver(), (0.0, 0.05)[rank])[0], choose(config, refusing)[0]
    assert alone == (("zero_copy", "zero_copy"), ("staged", "staged"))[rank], "the test would prove nothing"
    refusing = FakeDriver({("register", 0): 2} if rank == 1 else {})
    return [
        choose(config, FakeDriver(), (0.0, 0.05)[rank], world_size=2)[0],
        choose(config, FakeDriver(), (0.0, 0.005)[rank], world_size=2)[0],
        choose(config, refusing, world_size=2)[0],
    ]


def test_ranks_that_would_choose_differently_take_what_the_slowest_of_them_is_fastest_with() -> None:
    assert run_ranks(chosen_by_two, 2) == [["staged", "zero_copy", "staged"]] * 2


def test_each_engine_gets_what_it_needs_and_auto_does_without_pinning_if_it_must(
    caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    def on_gpu(*args: Any, **options: Any) -> str:
        return choose(*args, **options)[0]

    driver = FakeDriver()
    name, told = choose(OffloadConfig(), driver)
    assert name == "zero_copy"
    assert [line.partition(" (measured")[0].rpartition(" ")[0] for line in told] == [
        "offload.programs:",
        "offload.engine:",
    ]
    assert driver.calls["register"] == 1
    assert on_gpu(OffloadConfig(), FakeDriver(), zero_copy_s=0.03) == "staged"
    assert on_gpu(OffloadConfig(), FakeDriver(), out_s=0.03) == "mixed"
    refusing = FakeDriver({("register", 0): 2})
    assert on_gpu(OffloadConfig(), refusing) == "staged"
    assert "offload.engine: staged, since registering 22.27 KiB" in caplog.text
    for engine in ("zero_copy", "mixed"):
        with pytest.raises(PinError, match="CUDA_ERROR_OUT_OF_MEMORY"):
            on_gpu(OffloadConfig(engine=engine), FakeDriver({("register", 0): 2}))
    driver = FakeDriver()
    assert on_gpu(OffloadConfig(engine="mixed"), driver) == "mixed"
    assert driver.calls["register"] == 1
    for config in (OffloadConfig(engine="staged"), OffloadConfig(host_file=str(tmp_path))):
        unused = FakeDriver()
        assert on_gpu(config, unused) == "staged"
        assert unused.calls["register"] == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            OffloadConfig(engine="cpu"),
            r"^offload.engine=cpu keeps the window in host memory, but the model is on cuda:0",
        ),
        (
            OffloadConfig(emulate_link=LinkConfig(bytes_per_second=1e9)),
            r"^offload.emulate_link has no meaning on cuda:0",
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(config: OffloadConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(config, FakeDriver())


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "zero_copy", "host_file": "/somewhere"},
        {"engine": "mixed", "host_file": "/somewhere"},
        {"engine": "mixed", "emulate_link": {"bytes_per_second": 1e9}},
        {"engine": "staged", "emulate_link": {"bytes_per_second": 1e9}},
        {"engine": "zero_copy", "emulate_link": {"bytes_per_second": 1e9}},
        {"engine": "staged", "programs": 4},
        {"engine": "cpu", "programs": 4},
        {"mode": "resident", "programs": 4},
    ],
)
def test_settings_that_exclude_each_other_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"set .* to null"):
        OffloadConfig(**wrong)


@pytest.mark.parametrize(("setting", "programs"), [(None, 8), (3, 3)])
def test_copies_take_as_many_programs_as_the_config_says(
    setting: int | None, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    for name in ("fetch_records", "write_records"):
        monkeypatch.setattr(transfers_zero_copy, name, lambda *_, **options: launched.append(options))
    host = HostTable(300, 19)
    config = OffloadConfig(engine="zero_copy", programs=setting)
    engine = open_transfers(config, host, torch.zeros(50, 19), shard(), Ranks(1, None))
    rows = torch.arange(3)
    engine.fetch(rows, rows, 3).wait()
    engine.write_back(rows, rows).wait()
    engine.close()
    host.close()
    assert [(options["programs"], options["padded"]) for options in launched] == [(programs, True)] * 2


def test_host_memory_is_pinned_for_a_gpu_that_may_read_it_alone() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert pins(OffloadConfig(), gpu)
    assert pins(OffloadConfig(engine="zero_copy"), gpu)
    assert pins(OffloadConfig(engine="mixed"), gpu)
    assert not pins(OffloadConfig(engine="staged"), gpu)
    assert not pins(OffloadConfig(host_file="/somewhere"), gpu)
    assert not pins(OffloadConfig(), cpu)
