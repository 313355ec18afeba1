"""The time of one operation on a device, with cold caches: by events on a GPU, by the wall clock on a CPU."""

import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from launch.bench.measure import Spread

Run = Callable[[], object]

_WARMUP = 2
_FEWEST, _MOST = 5, 100
_SLEEP_CYCLES_A_SECOND = 2e9  # no GPU's clock is much faster
_LEAST_FLUSH = 32 << 20


class Clock(Protocol):
    """Times an operation several times. Caches are flushed before each, and what prepares it is not counted."""

    def time(self, run: Run, prepare: Run | None = None) -> Spread:
        """Milliseconds that `run` takes."""


def clock_of(device: torch.device, seconds: float) -> Clock:
    """The clock for operations on a device.

    Args:
        device: where they run.
        seconds: about how long one operation is timed, unless the minimum number of runs takes longer.
    """
    return CudaClock(device, seconds) if device.type == "cuda" else CpuClock(seconds)


class CpuClock:
    """Wall-clock time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._flush = torch.zeros(_LEAST_FLUSH // 4)

    def time(self, run: Run, prepare: Run | None = None) -> Spread:
        """See `Clock.time`."""
        for _ in range(_WARMUP):
            warm_ms = self._once(run, prepare)
        return Spread.of([self._once(run, prepare) for _ in range(_runs(self._seconds, warm_ms))])

    def _once(self, run: Run, prepare: Run | None) -> float:
        if prepare:
            prepare()
        self._flush.sum()
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)


class CudaClock:
    """Time between two events on the current stream, around an operation that is fully queued before it starts.

    The device sleeps until the host has queued everything, so that the host's own time is not counted, except where an
    operation makes the host wait.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._device, self._seconds = device, seconds
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        # Read, not written: written lines would be written back to memory while the operation is timed.
        self._flush = torch.zeros(max(4 * cache, _LEAST_FLUSH) // 4, device=device)
        self._flushed = torch.zeros((), device=device)

    def time(self, run: Run, prepare: Run | None = None) -> Spread:
        """See `Clock.time`."""
        for _ in range(_WARMUP):
            queued_s = self._queue_s(run, prepare)
        warm_ms = self._once(run, prepare, queued_s)
        return Spread.of([self._once(run, prepare, queued_s) for _ in range(_runs(self._seconds, warm_ms))])

    def _queue_s(self, run: Run, prepare: Run | None) -> float:
        """How long the host takes to queue it."""
        if prepare:
            prepare()
        torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        run()
        queued_s = time.perf_counter() - started
        torch.cuda.synchronize(self._device)
        return queued_s

    def _once(self, run: Run, prepare: Run | None, queued_s: float) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if prepare:
            prepare()
        torch.sum(self._flush, dim=0, out=self._flushed)
        torch.cuda._sleep(int(2 * min(queued_s, 0.05) * _SLEEP_CYCLES_A_SECOND))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def memory_rate(device: torch.device, clock: Clock, nbytes: int) -> float:
    """Bytes per second that a copy within the device's memory moves, reads and writes counted: the median."""
    source = torch.zeros(nbytes // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / (1e-3 * clock.time(lambda: target.copy_(source)).median)


def matmul_rate(device: torch.device, clock: Clock, size: int, dtype: torch.dtype) -> float:
    """Operations per second of a product of two square matrices: the median."""
    left, right = (_random(size, dtype, device) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / (1e-3 * clock.time(lambda: torch.mm(left, right, out=out)).median)


def _random(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Zeros would draw less power, and run faster than any real matrix.
    return torch.randn(size, size, device=device).to(dtype)


def _runs(seconds: float, warm_ms: float) -> int:
    return max(_FEWEST, min(_MOST, int(1e3 * seconds / max(warm_ms, 1e-3))))
