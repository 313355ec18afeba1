"""Records some training steps, kernel by kernel, as a trace that chrome://tracing and ui.perfetto.dev show."""

import gzip
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from offload.spans import record_spans, take_spans
from train.config.report import ProfileConfig
from train.files import new_file
from train.report.trace import STEPS_KEY, TRACE_FILE, as_text, joined, rank_events

if TYPE_CHECKING:
    import torch.profiler

__all__ = ["STEPS_KEY", "TRACE_FILE", "StepProfiler"]


class StepProfiler:
    """Records what the device does, and the calls that give it its work; on a CPU, PyTorch's operations.

    On a GPU the operations themselves are left out: recording them would slow the host down, and show gaps between
    kernels that are not there otherwise.

    Args:
        config: which steps; None for none.
        folder: of the run.
        device: that computes.
        group: the ranks that record together, with communication in host memory; what they call is collective then.
            None: this process alone.
    """

    def __init__(
        self,
        config: ProfileConfig | None,
        folder: Path,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self._config, self._folder, self._device, self._group = config, folder, device, group
        self._rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self._ranks = min(ranks, config.ranks or ranks) if config else 0
        self._profile: torch.profiler.profile | None = None
        self._recorded, self._ahead_ns, self._since_ns = 0, 0, 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around training step `number`, counted from 1.

        Raises:
            OSError: the trace cannot be written.
        """
        config = self._config
        if config is None or not config.first <= number < config.first + config.steps:
            yield
            return
        if not self._recorded:
            self._start()
        yield
        self._recorded += 1
        if number == config.first + config.steps - 1:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if that has not been done.

        Raises:
            OSError: the trace cannot be written.
        """
        steps, self._recorded = self._recorded, 0
        if not steps:
            return
        mine = gzip.compress(self._stop().encode(), 3) if self._profile else b""
        if self._rank:
            if mine:
                dist.send_object_list([mine], 0, self._group)
            return
        with new_file(self._folder / TRACE_FILE) as partial, gzip.open(partial, "wt", 6, encoding="utf-8") as file:
            file.writelines(joined(self._everyones(mine), steps=steps, ranks=self._ranks))

    def _start(self) -> None:
        # Imported here: it takes a while, and few runs need it.
        from torch.profiler import ProfilerActivity, profile

        self._finish_work()
        self._ahead_ns, self._since_ns = self._clocks()
        if self._rank >= self._ranks:
            return
        activity = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity])
        record_spans()
        self._profile.start()

    def _clocks(self) -> tuple[int, int]:
        """How far this host's clock is ahead of rank 0's, and what rank 0's shows, in nanoseconds."""
        if self._group is None:
            return 0, time.time_ns()
        dist.barrier(self._group)
        shown: list[tuple[str, int]] = [("", 0)] * dist.get_world_size(self._group)
        dist.all_gather_object(shown, (platform.node(), time.time_ns()), self._group)
        (host, now), (first_host, first) = shown[self._rank], shown[0]
        # As well as a barrier tells; on one host it is one clock.
        return 0 if host == first_host else now - first, first

    def _stop(self) -> str:
        """This rank's events, as text."""
        profile, self._profile = self._profile, None
        assert profile is not None
        self._finish_work()
        profile.stop()
        spans = take_spans()
        with tempfile.TemporaryDirectory(prefix="engram-trace-") as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            trace = json.loads(path.read_bytes())
        since_us = (self._since_ns + self._ahead_ns) / 1000
        return as_text(rank_events(trace, spans, rank=self._rank, host=platform.node(), since_us=since_us))

    def _everyones(self, mine: bytes) -> Iterator[str]:
        """Each recording rank's events, one after another: only one is in memory at a time."""
        yield gzip.decompress(mine).decode()
        for rank in range(1, self._ranks):
            sent: list[bytes] = [b""]
            dist.recv_object_list(sent, rank, self._group)
            yield gzip.decompress(sent[0]).decode()

    def _finish_work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
