"""The real job, trained at one point after another in one process a rank: nothing is built again but the window."""

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from launch.bench.devices import finish
from launch.bench.training.lane import open_run
from launch.plan.memory.tables import count_tables, largest_shard
from launch.tune.points import Point
from launch.tune.turns import Turn
from offload.engines import ENGINES
from offload.errors import Unavailable
from offload.tables import WindowTooSmall
from offload.window.interface import Traffic
from train.config.file import load
from train.config.job import JobConfig

T = TypeVar("T")

_STEPS = 1_000_000
_LEAST_WARM = 2
"""Steps before those that are timed."""
MOST_FILLING = 24
"""Steps until a new window has settled, at most."""
_FEW = 0.05
"""Of a window's slots: rows entering in a step that are too few to wait until it is full."""
_ROOM = 0.8
"""Of what is free, that a larger window may take."""


class TunedJob:
    """A run whose `offload` settings change between its turns. All methods are collective.

    Its rows count as updated and the tables' memory is there from the start: what is measured is a step late in a run,
    when no row is drawn any more.

    Args:
        config, overrides: the job.
        folder: for the run's own.
        start: the point that it begins with.

    Raises:
        UserError: the job cannot be trained.
    """

    def __init__(self, config: str, overrides: Sequence[str], folder: str, start: Point) -> None:
        in_file = load(config, overrides, JobConfig).offload.host_file is not None
        late = ["offload.verify=false", "train.profile=null", "checkpoint.init_from=null"]
        late += [] if in_file else ["offload.host_touch=true"]
        set_to = [f"offload.{name}={'null' if value is None else value}" for name, value in vars(start).items()]
        self._parts, self._trainer = open_run(config, [*overrides, *late, *set_to], folder, "tune", _STEPS)
        self._tables, self._device = self._parts.tables, self._parts.engine.device
        self._tables.count_all_as_updated()
        self.job: JobConfig = self._parts.job
        self.shard_rows = largest_shard(count_tables(self.job.model.engram), dist.get_world_size())
        """Of the largest shard."""
        # By its name: `auto` would be measured, by all ranks together, each time that a window is opened.
        slots = min(start.window_rows, self.shard_rows)
        self.start = replace(start, window_rows=slots, engine=self._tables.engine)
        """The configured point, with the engine that `auto` means here, and no more slots than a shard has rows."""
        self._tables.reopen(self.start.apply(self.job.offload))
        self._at, self._point, self._entered, self._entering = 0, self.start, 0, 0.0
        gc.collect()
        gc.freeze()  # as the trainer does

    def warm_up(self) -> float:
        """Fills the first window; seconds of the fastest step."""
        return min(self._fill(MOST_FILLING))

    def turn(self, point: Point, stage: int, number: int, steps: int) -> Turn | None:
        """Trains `steps` at a point, behind others that do not count.

        None if this machine has no such engine, or the window does not hold a step.
        """
        try:
            return self._timed(point, stage, number, steps) if self._take(point) else None
        except WindowTooSmall:
            return None

    def room_rows(self) -> int:
        """The largest window for which all ranks have room, besides what they hold."""
        slots = min(self._point.window_rows, self.shard_rows)
        each = self._tables.window_bytes / max(1, slots)
        if self._device.type == "cuda":
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            free = torch.cuda.mem_get_info()[0] + unused
        else:
            free = psutil.virtual_memory().available // dist.get_world_size()
        return -round(self._most(-(slots + _ROOM * free / each)))

    @property
    def engines(self) -> list[str]:
        """Engines that may carry the rows here; none where there is no choice."""
        if self._device.type != "cuda":
            return []
        in_file = self.job.offload.host_file is not None
        return [name for name, facts in ENGINES.items() if not (in_file and facts.pins)]

    def everyones(self, value: T) -> T:
        """What rank 0 says."""
        told = [value]
        dist.broadcast_object_list(told, src=0, device=self._device)
        return told[0]

    def _timed(self, point: Point, stage: int, number: int, steps: int) -> Turn:
        finish(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = self._tables.traffic
        ended = [time.perf_counter()]
        for _ in range(steps):
            self._step()
            ended.append(time.perf_counter())
        finish(self._device)
        ended[-1] = time.perf_counter()
        traffic = self._tables.traffic.since(before)
        self._enter(before, steps)
        return self._told(point, stage, number, ended, traffic)

    def _take(self, point: Point) -> bool:
        before, self._point = self._point, point
        if point.build == before.build:
            self._tables.reopen(point.apply(self.job.offload))
            for _ in range(max(_LEAST_WARM, before.depth, point.depth)):
                self._step()
            return True
        self._entered = 0
        try:
            self._tables.reopen(point.apply(self.job.offload))
        except Unavailable:  # on every rank
            self._point = before
            return False
        self._fill(MOST_FILLING)
        return True

    def _fill(self, most: int) -> list[float]:
        """Trains until the window has settled; seconds of each step."""
        seconds: list[float] = []
        while len(seconds) < _LEAST_WARM + self._point.depth or (len(seconds) < most and not self._settled()):
            before, started = self._tables.traffic, time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - started)
            self._enter(before, 1)
        return seconds

    def _enter(self, before: Traffic, steps: int) -> None:
        traffic = self._tables.traffic.since(before)
        self._entering = (traffic.requested - traffic.hits) / steps
        self._entered += traffic.requested - traffic.hits

    def _settled(self) -> bool:
        """Whether each rank's window is full, or but few rows still enter it."""
        slots = min(self._point.window_rows, self.shard_rows)
        return not self._most(float(self._entered < slots and self._entering > _FEW * slots))

    def _step(self) -> None:
        self._trainer.train_step(self._at)
        self._at += 1

    def _told(self, point: Point, stage: int, number: int, ended: Sequence[float], traffic: Traffic) -> Turn:
        count = len(ended) - 1
        sums = [traffic.requested, traffic.hits, traffic.fetched, traffic.written_back, _resident_bytes()]
        requested, hits, fetched, written, host = self._reduced(sums, dist.ReduceOp.SUM)
        slowest = [traffic.waited_s, traffic.planned_s, self._device_bytes()]
        waited, planned, device = self._reduced(slowest, dist.ReduceOp.MAX)
        return Turn(
            point,
            stage,
            number,
            tuple(1e3 * (end - start) for start, end in pairwise(ended)),
            stall_ms=1e3 * waited / count,
            plan_ms=1e3 * planned / count,
            hit_rate=hits / requested if requested else 1.0,
            fetched=fetched / count,
            written_back=written / count,
            device_bytes=round(device),
            host_bytes=round(host),
            settled=self._settled(),
        )

    def _device_bytes(self) -> int:
        on_gpu = self._device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_gpu else self._tables.window_bytes

    def _most(self, number: float) -> float:
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def _reduced(self, numbers: Sequence[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        found = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        dist.all_reduce(found, how)
        return list(found.tolist())


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
