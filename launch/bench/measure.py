"""Times contenders in turn, so that a machine that drifts drifts for all of them."""

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from train.progress import Progress

Act = TypeVar("Act")

_TASKS = Path("/proc/self/task")
_SCHEDULED = Path("/proc/thread-self/schedstat")
_QUIET_S = 2e-3
_QUIET_SHARE = 0.1
_QUIET_TIMEOUT_S = 10.0


class Contender(Protocol):
    """Something whose steps are timed."""

    name: str

    def step(self, step: int) -> None:
        """Takes one step; steps come in order, from 0."""

    def close(self) -> None:
        """Releases threads and memory."""


@dataclass(frozen=True)
class Spread:
    """A sample of numbers: its median, and the range of its middle 80 %."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        return cls(statistics.median(values), deciles[0], deciles[-1])


@dataclass
class Times:
    """Milliseconds of a contender's timed steps, in order.

    Attributes:
        step_ms: from the start of a step to its return.
        background_ms: how long other threads of the process still worked after that.
        cpu_ms: processor time of all threads, background work included.
    """

    step_ms: list[float] = field(default_factory=list)
    background_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def race(
    contenders: Sequence[Contender],
    *,
    steps: int,
    warmup: int,
    progress: Progress,
) -> list[Times]:
    """Times `steps` steps of every contender, one step each in turn; the first of a round is the last of the next.

    The first `warmup` steps are not counted. A contender's background work ends before the next one's turn.
    """
    times = [Times() for _ in contenders]
    progress.expect((warmup + steps) * len(contenders))
    with _collector_paused():
        for step in range(warmup + steps):
            for turn in range(len(contenders)):
                place = (turn + step) % len(contenders)
                measured = _timed(contenders[place], step)
                if step >= warmup:
                    _append(times[place], *measured)
                progress.advance()
    return times


def ratios(times: Times, base: Times) -> Spread:
    """How many times as long the steps took as those of `base`, compared round by round."""
    return Spread.of([mine / theirs for mine, theirs in zip(times.step_ms, base.step_ms, strict=True)])


def timed(act: Callable[[], object]) -> float:
    """Seconds that something takes."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def in_turns(named: dict[str, Act], number: int) -> list[tuple[str, Act]]:
    """Who goes first in one round goes last in the next."""
    return [*named.items()][:: -1 if number % 2 else 1]


def queued_s() -> float:
    """Seconds for which this thread has waited for a core so far; 0 where the system does not say."""
    return int(_SCHEDULED.read_text().split()[1]) / 1e9 if _SCHEDULED.exists() else 0.0


def wait_until_idle() -> float:
    """Waits until no thread of this process works; returns the seconds that this took, accurate to about 2 ms."""
    started = time.perf_counter()
    while True:
        quiet_since, used = time.perf_counter(), time.process_time()
        time.sleep(_QUIET_S)
        quiet = time.process_time() - used < _QUIET_SHARE * _QUIET_S and not _others_runnable()
        if quiet or quiet_since - started > _QUIET_TIMEOUT_S:
            return quiet_since - started


def _others_runnable() -> bool:
    """Whether another thread of this process wants a core: on a busy machine it may wait for one and use no time."""
    mine = str(threading.get_native_id())
    for task in _TASKS.iterdir() if _TASKS.exists() else ():
        with suppress(OSError):  # a thread that ended meanwhile
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            if task.name != mine and state in "RD":
                return True
    return False


def _timed(contender: Contender, step: int) -> tuple[float, float, float]:
    used, started = time.process_time(), time.perf_counter()
    contender.step(step)
    step_s = time.perf_counter() - started
    background_s = wait_until_idle()
    return step_s, background_s, time.process_time() - used


def _append(times: Times, step_s: float, background_s: float, cpu_s: float) -> None:
    times.step_ms.append(1e3 * step_s)
    times.background_ms.append(1e3 * background_s)
    times.cpu_ms.append(1e3 * cpu_s)


@contextmanager
def _collector_paused() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
