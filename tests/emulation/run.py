"""Runs the real planner, tables, window, engine and training loop over virtual streams and threads."""

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch.distributed as dist
from torch import Tensor

import offload.device.sender
import offload.opening
import offload.plan.planner
import offload.step
import offload.tables
import offload.transfers.open
import offload.transfers.staged
import offload.transfers.zero_copy
import offload.window.interface
import offload.window.store
from offload.rows.records import RecordLayout, RowInit
from offload.rows.updater import ReadRows, RowUpdater
from offload.step import Step
from offload.tables import EngramTables
from offload.window.resident import ResidentStore
from tests.emulation.clock import Simulation, Span
from tests.emulation.critical_path import critical_path
from tests.emulation.device import VirtualEvent, VirtualStreams, VirtualWorker
from tests.emulation.hardware import CARRIED_IN, CARRIED_OUT, FETCH, STAGING, WRITE_BACK, Hardware
from tests.emulation.network import EmulatedEngine
from tests.emulation.results import TODAY, Access, Run, StepReport, Variant
from tests.emulation.workload import Workload
from train.trainer import Trainer

_FURTHER = 70
"""Steps that are never trained, beyond any look-ahead."""


def run(
    workload: Workload,
    hardware: Hardware,
    depth: int | None,
    *,
    warmup: int,
    steps: int,
    variant: Variant = TODAY,
    watched: bool = False,
) -> Run:
    """Trains, the first `warmup` steps uncounted; all rows resident without a depth. `watched` keeps the accesses."""
    gc.disable()  # its pauses would count as work
    try:
        return _Emulation(workload, hardware, depth, variant, watched).train(warmup, steps)
    finally:
        gc.enable()


class _Emulation:
    def __init__(
        self, workload: Workload, hardware: Hardware, depth: int | None, variant: Variant, watched: bool
    ) -> None:
        self.workload, self.hardware, self.depth, self.variant = workload, hardware, depth, variant
        self.watched, self.result = watched, Run()
        self.simulation = Simulation(hardware.rate(variant.programs), hardware.host.factor)
        self.streams = VirtualStreams(self.simulation, self._send)
        self.side = VirtualStreams.new(self.streams)
        self.values: VirtualEvent | None = None
        self.gradients: VirtualEvent | None = None
        self.copies: list[Span] = []

    def train(self, warmup: int, steps: int) -> Run:
        with _one_rank(), self._over_virtual_time():
            tables = self._open(warmup + steps)
            engine = EmulatedEngine(
                self.simulation, self.streams, self.hardware, self.workload.size, self._before, self._behind
            )
            engine.optimizer_waits = self.variant.rows_before_backbone
            trainer = Trainer(
                self.workload.job,
                engine=cast(Any, engine),
                tables=tables,
                train_loader=cast(Any, SimpleNamespace(sources=[SimpleNamespace(name="")])),
                held_out=(),
                checkpoints=cast(Any, None),
                reporter=cast(Any, None),
            )
            result = self.result
            for number in range(warmup + steps):
                began = self.streams.compute.last
                self.copies.clear()
                tables.take_traffic()
                result.norms.append(trainer.train_step(number).grad_norm)
                if engine.optimizer_waits:
                    engine.late_step()
                self.simulation.charge()
                if number >= warmup:
                    result.steps.append(self._report(tables, began))
            tables.close()
        return result

    def _open(self, num_steps: int) -> EngramTables:
        job = self.workload.job
        update: dict[str, Any] = {"engine": "auto", "mode": "resident"}
        if self.depth is not None:
            update = {"engine": self.variant.engine, "mode": "window", "depth": self.depth}
            if self.variant.engine != "staged":
                update["programs"] = self.variant.programs
        with self.simulation.uncharged():
            return EngramTables(
                job.offload.model_copy(update=update),
                self.workload.addresses,
                dim=job.model.engram.row_dim,  # type: ignore[union-attr]
                init=RowInit(job.train.seed, 0.02),
                batches=self.workload.batches,
                num_steps=num_steps + _FURTHER,  # the last steps that count look ahead as all others do
            )

    def _report(self, tables: EngramTables, began: Span) -> StepReport:
        traffic = tables.take_traffic()
        last = self.streams.compute.last
        # Copies that still go on belong to the next step, which clears the list when it begins.
        copied = sum(span.end - span.start for span in self.copies if span.done)
        self.simulation.wait(last)
        seconds = last.end - began.end
        path = critical_path(last, began.end)
        return StepReport(
            seconds, path, traffic.waited_s, traffic.requested, traffic.fetched, traffic.written_back, copied
        )

    # The order of the steps that are otherwise than in the code.

    def _before(self) -> None:
        if self.values is not None:
            self.streams.compute.wait_event(self.values)
            self.values = None

    def _behind(self) -> None:
        if not self.variant.gradients_late:
            self.gradients = self.streams.compute.record_event()

    # What the device does.

    def _launch(self, what: str, seconds: float, launches: int = 1) -> Span:
        self.simulation.charge()
        self.simulation.work(launches * self.hardware.host.launch_seconds, self.simulation.thread.name)
        return self.streams.current().launch(what, seconds)

    def _send(self, nbytes: int) -> None:
        self._launch("numbers", nbytes / self.hardware.link.copy_engine_bytes_per_second)

    def _copy(self, what: str, rows: int) -> Span:
        seconds = self.hardware.copy_seconds(what, rows * self.workload.record_bytes, self.variant.programs)
        self.copies.append(copy := self._launch(what, seconds))
        return copy

    def _carried(self, carry: Callable[..., None]) -> Callable[..., None]:
        def carried(source: Tensor, target: Tensor) -> None:
            with self.simulation.uncharged():
                carry(source, target)
            inward = self.simulation.thread.name == STAGING[0]
            seconds = len(source) * self.workload.packed_bytes / self.hardware.link.copy_engine_bytes_per_second
            self.copies.append(self._launch(CARRIED_IN if inward else CARRIED_OUT, seconds))

        return carried

    def _gathered(self, gather: Callable[..., None]) -> Callable[..., None]:
        def gathered(records: Tensor, numbers: Tensor, out: Tensor) -> None:
            with self.simulation.uncharged():
                gather(records, numbers, out)
            kind, span = self._stage(len(numbers), gathered=True)
            self._note(span, (kind, numbers), (kind, numbers[:0]))

        return gathered

    def _scattered(self, scatter: Callable[..., None]) -> Callable[..., None]:
        def scattered(gathered: Tensor, records: Tensor, numbers: Tensor) -> None:
            with self.simulation.uncharged():
                scatter(gathered, records, numbers)
            kind, span = self._stage(len(numbers), gathered=False)
            self._note(span, (kind, numbers[:0]), (kind, numbers))

        return scattered

    def _stage(self, rows: int, *, gathered: bool) -> tuple[str, Span]:
        """Records between a staging buffer and where they belong: slots on the device, or rows of host memory."""
        nbytes = rows * self.workload.packed_bytes
        if self.simulation.thread.current is not None:
            return "slot", self._launch("rows", 2 * nbytes / self.hardware.device.memory_bytes_per_second)
        self.simulation.work(self.hardware.staging_seconds(nbytes, gathered=gathered), self.simulation.thread.name)
        return "row", self.simulation.thread.last

    def _chunk_bytes(self, nbytes: int) -> int:
        """So many that a chunk has as many narrow records as it would have real ones."""
        job = self.workload.job
        narrow = RecordLayout.of(job.model.engram.row_dim, job.offload.optimizer, job.offload.row_dtype)  # type: ignore[union-attr]
        return max(1, nbytes // self.workload.packed_bytes) * narrow.bytes

    def _note(self, span: Span, reads: tuple[str, Tensor], writes: tuple[str, Tensor]) -> None:
        if self.watched:
            self.result.accesses.append(Access(span, reads, writes))

    def _fetch(self, fetch: Callable[..., None]) -> Callable[..., None]:
        def fetched(host: Tensor, rows: Tensor, window: Tensor, slots: Tensor, **how: Any) -> None:
            with self.simulation.uncharged():
                fetch(host, rows, window, slots, **how)
            self._note(self._copy(FETCH, len(rows)), ("row", rows), ("slot", slots))

        return fetched

    def _draw(self, draw: Callable[..., None]) -> Callable[..., None]:
        def drawn(window: Tensor, slots: Tensor, rows: Tensor, **how: Any) -> None:
            with self.simulation.uncharged():
                draw(window, slots, rows, **how)
            span = self._launch("rows", len(rows) * self.hardware.rows.draw_seconds)
            self._note(span, ("row", rows[:0]), ("slot", slots))

        return drawn

    def _write(self, write: Callable[..., None]) -> Callable[..., None]:
        def written(window: Tensor, slots: Tensor, host: Tensor, rows: Tensor, **how: Any) -> None:
            with self.simulation.uncharged():
                write(window, slots, host, rows, **how)
            self._note(self._copy(WRITE_BACK, len(rows)), ("slot", slots), ("row", rows))

        return written

    @contextmanager
    def _aside(self, wanted: bool, after: VirtualEvent | None = None) -> Iterator[None]:
        """Work of the device that goes to the side stream, behind what the model's was given so far or up to a mark."""
        if not wanted:
            yield
            return
        self.side.wait_event(after or self.streams.compute.record_event())
        with self.streams.use(self.side):
            yield

    def _read(self, read: Callable[..., ReadRows]) -> Callable[..., ReadRows]:
        def reading(updater: RowUpdater, records_CW: Tensor, slots_U: Tensor) -> ReadRows:
            with self.simulation.uncharged():
                found = read(updater, records_CW, slots_U)
            aside = self.variant.values_aside
            with self._aside(aside):
                span = self._launch("rows", len(slots_U) * self.hardware.rows.read_seconds)
                self._note(span, ("slot", slots_U), ("slot", slots_U[:0]))
                self._exchange(len(slots_U))
                if aside:
                    self.values = self.side.record_event()
            return found

        return reading

    def _exchange(self, rows: int) -> None:
        ranks = self.workload.part.ranks
        if ranks > 1:
            sent = rows * self.workload.row_bytes * (ranks - 1) / ranks
            self._launch("exchange", sent / self.hardware.device.exchange_bytes_per_second)

    def _reduce(self, reduce: Callable[[Step], Tensor]) -> Callable[[Step], Tensor]:
        def reducing(step: Step) -> Tensor:
            with self.simulation.uncharged():
                norm_squared = reduce(step)
            rows = sum(len(gradient.total) for gradient in step.rows.gradients)
            with self._aside(self.gradients is not None, self.gradients):
                self._exchange(rows)
                seconds = 3 * rows * self.workload.row_bytes / self.hardware.device.memory_bytes_per_second
                self._launch("rows", seconds, launches=3)
            if self.gradients is not None:
                self.streams.compute.wait_event(self.side.record_event())
                self.gradients = None
            return norm_squared

        return reducing

    def _update(self, update: Callable[..., None]) -> Callable[..., None]:
        # Measured when the update replayed missed steps again, as the read had; of the read all but bytes is replay.
        rows, moved = self.hardware.rows, self.workload.record_bytes / self.hardware.device.memory_bytes_per_second
        row_seconds = rows.update_seconds - max(0.0, rows.read_seconds - moved)

        def updating(updater: RowUpdater, read: ReadRows, *args: Any, **how: Any) -> None:
            slots_U = read.placed.slots_U
            with self.simulation.uncharged():
                update(updater, read, *args, **how)
            self._note(self._launch("rows", len(slots_U) * row_seconds), ("slot", slots_U), ("slot", slots_U))

        return updating

    def _release(self, release: Callable[..., None]) -> Callable[..., None]:
        """Of resident rows, whose counts of updates are on the device; the window's are the window's thread's."""

        def released(store: ResidentStore, step: int, *, updated: bool) -> None:
            with self.simulation.uncharged():
                release(store, step, updated=updated)
            if updated:
                # A row's place is read twice, its count twice and written once, or thereabouts.
                nbytes = 4 * store._held_O.nbytes
                self._launch("rows", nbytes / self.hardware.device.memory_bytes_per_second, launches=4)

        return released

    @contextmanager
    def _over_virtual_time(self) -> Iterator[None]:
        beside = () if self.variant.decided_in_loop else ("cpu",)
        zero_copy, staged = offload.transfers.zero_copy, offload.transfers.staged

        def worker(name: str, *_: Any) -> VirtualWorker:
            return VirtualWorker(self.simulation, name)

        with ExitStack() as stack:

            def put(owner: Any, name: str, value: Any) -> None:
                stack.enter_context(mock.patch.object(owner, name, value))

            for seam in (offload.device.sender, offload.transfers.open):
                put(seam, "streams_of", lambda _: self.streams)
            for seam in (offload.window.store, offload.plan.planner, staged):
                put(seam, "background_worker", worker)
            for seam in (offload.window.interface, offload.plan.planner):
                put(seam, "time", _VirtualTime(self.simulation))
            put(offload.opening, "_DECIDING_BESIDE", beside)
            put(offload.tables, "make_plan", self.workload.planned(self.simulation, offload.tables.make_plan))
            put(zero_copy, "fetch_records", self._fetch(zero_copy.fetch_records))
            put(zero_copy, "draw_records", self._draw(zero_copy.draw_records))
            put(zero_copy, "write_records", self._write(zero_copy.write_records))
            put(staged, "draw_records", self._draw(staged.draw_records))
            put(staged, "_gather", self._gathered(staged._gather))
            put(staged, "_scatter", self._scattered(staged._scatter))
            put(staged, "_carry", self._carried(staged._carry))
            put(staged, "_CHUNK_BYTES", self._chunk_bytes(staged._CHUNK_BYTES))
            put(RowUpdater, "read", self._read(RowUpdater.read))
            put(RowUpdater, "update_at", self._update(RowUpdater.update_at))
            put(ResidentStore, "release", self._release(ResidentStore.release))
            put(Step, "reduce", self._reduce(Step.reduce))
            yield


class _VirtualTime:
    """What the tables' own counters of waiting look at."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

    def perf_counter(self) -> float:
        self._simulation.charge()
        return self._simulation.now


@contextmanager
def _one_rank() -> Iterator[None]:
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
