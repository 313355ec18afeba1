"""Measures the steps between two records: time, loss, and what the tables did, over all ranks."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from offload.tables import EngramTables
from offload.window.interface import Traffic
from train.data.batches.batch import Batch
from train.memory import MemoryUse, memory_use
from train.report.gates import Gates
from train.report.metrics import OffloadMetrics
from train.report.source_losses import SourceLosses
from train.report.stages import StageClock


@dataclass(frozen=True)
class Measured:
    """Means over the steps of a record.

    Attributes:
        loss: of the last step, over all ranks, in nats per token.
        step_ms: time of a step.
        tokens: trained on since the start of the run, padding included.
        tokens_per_s: over all ranks.
        offload: None without Engram.
        stages_ms: of a step, what of `step_ms` each stage of this rank's loop took; the sum is `step_ms`.
        source_losses: by source, over all steps of the record, in nats a token; empty without a mixture.
        memory: bytes that a process takes, the largest rank's.
        mfu: model FLOPs utilisation, 0 to 1; None where the devices' peak is not known.
        gates: how far those of each Engram layer opened, by the names of metrics.jsonl.
        expert_load: tokens of the busiest expert over the mean's, in the least balanced layer; None without experts.
    """

    loss: float
    step_ms: float
    tokens: int
    tokens_per_s: float
    offload: OffloadMetrics | None
    stages_ms: dict[str, float]
    source_losses: dict[str, float]
    memory: MemoryUse
    mfu: float | None
    expert_load: float | None
    gates: dict[str, float]

    def use(self) -> dict[str, float]:
        """What the step took of the machine, and how it went inside, by the names of metrics.jsonl."""
        use: dict[str, float] = {"memory.host_bytes": self.memory.host}
        if self.memory.device_peak:
            use["memory.device_peak_bytes"] = self.memory.device_peak
        shares = {"mfu": self.mfu, "experts.busiest": self.expert_load}
        return use | {name: value for name, value in shares.items() if value is not None} | self.gates


class Meter:
    """Counts steps until they are recorded.

    Args:
        tables: whose traffic is measured; None without Engram.
        device: that the ranks communicate from.
        tokens: that the run was trained on before.
        sources: names of those of a mixture; none without one.
        gates: counts gates; None for none.
        ideal_s: see `train.report.utilisation.ideal_s_per_token`.
    """

    def __init__(
        self,
        tables: EngramTables | None,
        device: torch.device,
        *,
        tokens: int = 0,
        sources: Sequence[str] = (),
        gates: Gates | None = None,
        ideal_s: Callable[[int], float] | None = None,
    ) -> None:
        self._tables, self._device, self._ideal_s_per_token = tables, device, ideal_s
        self._by_source, self._gates = SourceLosses(sources, device), gates
        self.tokens = tokens
        """Trained on since the start of the run, over all ranks; those of skipped steps count."""
        self.tokens_per_expert: Tensor | None = None
        """Of the last step that was applied, over all ranks: fp64 [layers, E], read only when it is recorded."""
        self._loss = torch.zeros(())
        self.stages = StageClock()
        """Is told of each stage of a step."""
        self.rows_moved = 0
        """Rows of all ranks that travelled between host memory and the windows, in all records so far."""
        self.restart()

    def restart(self) -> None:
        """Begins the next record; time spent since the last one does not count."""
        self._steps = self._tokens = 0
        self._ideal_s = 0.0
        self._by_source.restart()
        if self._gates:
            self._gates.restart()
        self.stages.restart()
        if self._tables:
            self._tables.take_traffic()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside does not count."""
        paused = time.perf_counter()
        yield
        self.stages.leave_out(time.perf_counter() - paused)

    def losses(self, batch: Batch) -> Callable[[Tensor], None] | None:
        """What is to hear of each label's loss in a micro-batch; None where it has one source."""
        return self._by_source.of(batch)

    def count(self, loss: Tensor, sequences: int, length: int) -> None:
        """One more step, with this rank's part of its loss, all ranks' sequences, and the tokens of each."""
        tokens = sequences * length
        self._steps += 1
        self._tokens += tokens
        self.tokens += tokens
        if self._ideal_s_per_token:
            self._ideal_s += tokens * self._ideal_s_per_token(length)
        self._loss = loss

    def measure(self) -> Measured:
        """What was counted since `restart`. Collective."""
        stages_s = self.stages.seconds()
        elapsed_s = sum(stages_s.values())
        loss = self._loss.to(self._device).clone()
        dist.all_reduce(loss)
        stages_ms = {stage: 1e3 * seconds / self._steps for stage, seconds in stages_s.items()}
        traffic = self._tables.take_traffic() if self._tables else None
        waited_s, planned_s, *memory = self._most(
            *((traffic.waited_s, traffic.planned_s) if traffic else (0.0, 0.0)), *memory_use(self._device)
        )
        return Measured(
            loss=float(loss),
            step_ms=1e3 * elapsed_s / self._steps,
            tokens=self.tokens,
            tokens_per_s=self._tokens / elapsed_s,
            offload=self._offload(traffic, waited_s, planned_s) if traffic else None,
            stages_ms=stages_ms,
            source_losses=self._by_source.take(),
            memory=MemoryUse(*map(int, memory)),
            mfu=self._ideal_s / elapsed_s if self._ideal_s_per_token else None,
            expert_load=self._expert_load(),
            gates=self._gates.take() if self._gates else {},
        )

    def _expert_load(self) -> float | None:
        counts_LE = self.tokens_per_expert
        if counts_LE is None or not counts_LE.numel():
            return None
        return float((counts_LE.amax(dim=1) / counts_LE.mean(dim=1).clamp(min=1)).max())

    def _most(self, *values: float) -> list[float]:
        """The largest rank's of each."""
        most = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found: list[float] = most.tolist()
        return found

    def _offload(self, traffic: Traffic, waited_s: float, planned_s: float) -> OffloadMetrics:
        counts = traffic.requested, traffic.hits, traffic.fetched, traffic.written_back
        sums = torch.tensor(counts, device=self._device)
        dist.all_reduce(sums)
        requested, hits, fetched, written = sums.tolist()
        self.rows_moved += fetched + written
        return OffloadMetrics(
            stall_ms=1e3 * waited_s / self._steps,
            plan_ms=1e3 * planned_s / self._steps,
            fetch_rows=round(fetched / self._steps),
            hit_rate=hits / requested if requested else 1.0,
            writeback_rows=round(written / self._steps),
        )
