"""Measures the steps between two records: time, loss, and what the tables did, over all ranks."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from offload.tables import EngramTables
from train.data.batch import Batch
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
    """

    loss: float
    step_ms: float
    tokens: int
    tokens_per_s: float
    offload: OffloadMetrics | None
    stages_ms: dict[str, float]
    source_losses: dict[str, float]


class Meter:
    """Counts steps until they are recorded.

    Args:
        tables: whose traffic is measured; None without Engram.
        device: that the ranks communicate from.
        tokens: that the run was trained on before.
        sources: names of those of a mixture; none without one.
    """

    def __init__(
        self,
        tables: EngramTables | None,
        device: torch.device,
        *,
        tokens: int = 0,
        sources: Sequence[str] = (),
    ) -> None:
        self._tables, self._device = tables, device
        self._by_source = SourceLosses(sources, device)
        self.tokens = tokens
        """Trained on since the start of the run, over all ranks; those of skipped steps count."""
        self._loss = torch.zeros(())
        self.stages = StageClock()
        """Is told of each stage of a step."""
        self.rows_moved = 0
        """Rows of all ranks that travelled between host memory and the windows, in all records so far."""
        self.restart()

    def restart(self) -> None:
        """Begins the next record; time spent since the last one does not count."""
        self._steps = self._tokens = 0
        self._by_source.restart()
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

    def count(self, loss: Tensor, tokens: int) -> None:
        """One more step, with this rank's part of its loss and all ranks' tokens."""
        self._steps += 1
        self._tokens += tokens
        self.tokens += tokens
        self._loss = loss

    def measure(self) -> Measured:
        """What was counted since `restart`. Collective."""
        stages_s = self.stages.seconds()
        step_s = sum(stages_s.values()) / self._steps
        loss = self._loss.to(self._device).clone()
        dist.all_reduce(loss)
        stages_ms = {stage: 1e3 * seconds / self._steps for stage, seconds in stages_s.items()}
        speed = self._tokens / self._steps / step_s
        losses = self._by_source.take()
        return Measured(float(loss), 1e3 * step_s, self.tokens, speed, self._offload(), stages_ms, losses)

    def _offload(self) -> OffloadMetrics | None:
        if not self._tables:
            return None
        traffic = self._tables.take_traffic()
        counts = traffic.requested, traffic.hits, traffic.fetched, traffic.written_back
        sums = torch.tensor(counts, device=self._device)
        slowest = torch.tensor([traffic.waited_s, traffic.planned_s], dtype=torch.float64, device=self._device)
        dist.all_reduce(sums)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        requested, hits, fetched, written = sums.tolist()
        waited_s, planned_s = slowest.tolist()
        self.rows_moved += fetched + written
        return OffloadMetrics(
            stall_ms=1e3 * waited_s / self._steps,
            plan_ms=1e3 * planned_s / self._steps,
            fetch_rows=round(fetched / self._steps),
            hit_rate=hits / requested if requested else 1.0,
            writeback_rows=round(written / self._steps),
        )
