"""Random delays wherever something runs beside the training loop, and a count of the rare events that they provoke."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from offload import gradients, step, tables
from offload.transfers.open import CpuTransfers
from offload.window.admissions import Admissions
from offload.window.directory import SlotState
from offload.window.open import open_directory

Directory = type(open_directory(1, 1))
"""The one that windows have here."""

LONGEST_S = 0.003


@dataclass
class Seen:
    """How often the cases came up that a test wants to have met.

    Attributes:
        resurrected: rows taken back while their copy to host memory was under way.
        waited: times that rows were held back because of such a copy.
        reused: slots fetched into that a write-back had emptied.
        full: times that a step found too few free slots.
    """

    resurrected: int = 0
    waited: int = 0
    reused: int = 0
    full: int = 0

    def __add__(self, other: "Seen") -> "Seen":
        return Seen(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@contextmanager
def random_delays(seed: int, longest_s: float = LONGEST_S, longest_write_back_s: float = LONGEST_S) -> Iterator[Seen]:
    """Delays the fetches, write-backs, plans and exchanges of all tables of this process at random, by `seed`.

    Each copy is also torn in two, with a pause between: half of its rows have landed, the other half has not.
    """
    seen = Seen()
    with ExitStack() as patches:

        def patch(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
            patches.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))

        for name, longest in (("_fetch", longest_s), ("_write_back", longest_write_back_s)):
            pauses = _Pauses(seed, name, longest)
            patch(CpuTransfers, name, lambda copy, pauses=pauses: _torn(copy, pauses))
        slow = ((tables, "make_plan"), (step, "exchange_values"), (gradients, "exchange_gradients"))
        for owner, name in slow:
            patch(owner, name, lambda call, name=name: _late(call, _Pauses(seed, name, longest_s)))
        written: set[int] = set()
        patch(CpuTransfers, "write_back", lambda call: _noting(call, lambda slots, _: written.update(slots.tolist())))
        patch(CpuTransfers, "fetch", lambda call: _noting(call, lambda _, slots: _count_reused(slots, written, seen)))
        patch(Directory, "admit", lambda call: _counting_admissions(call, seen))
        patch(Admissions, "_has_room", lambda call: _counting_full_windows(call, seen))
        patch(Directory, "being_written", lambda call: _counting_waits(call, seen))
        yield seen


class _Pauses:
    def __init__(self, seed: int, name: str, longest_s: float) -> None:
        self._random, self._longest_s = random.Random(f"{seed} {name}"), longest_s

    def __call__(self) -> None:
        # Short and long ones: what comes first must not follow from the order of calls.
        time.sleep(self._longest_s * self._random.choice((0, 0, 0.1, 1)))


def _torn(copy: Callable[..., None], pause: Callable[[], None]) -> Callable[..., None]:
    def torn(self: CpuTransfers, sources: Tensor, targets: Tensor, *stored: int) -> None:
        half = len(sources) // 2
        for part in (range(half), range(half, len(sources))):
            pause()
            counts = (min(max(count - part.start, 0), len(part)) for count in stored)
            copy(self, sources[part.start : part.stop], targets[part.start : part.stop], *counts)

    return torn


def _late(call: Callable[..., Any], pause: Callable[[], None]) -> Callable[..., Any]:
    def late(*args: Any, **keywords: Any) -> Any:
        pause()
        return call(*args, **keywords)

    return late


def _noting(call: Callable[..., Any], note: Callable[[Tensor, Tensor], None]) -> Callable[..., Any]:
    def noting(self: CpuTransfers, sources: Tensor, targets: Tensor, *stored: int) -> Any:
        note(sources, targets)
        return call(self, sources, targets, *stored)

    return noting


def _count_reused(slots: Tensor, written: set[int], seen: Seen) -> None:
    seen.reused += len(written & set(slots.tolist()))


def _counting_admissions(admit: Callable[..., Any], seen: Seen) -> Callable[..., Any]:
    def counting(self: Directory, step: int, rows: np.ndarray) -> Any:
        slots = self.slots(rows)
        leaving = int((self.state[slots[slots >= 0]] == SlotState.WRITEBACK).sum())
        seen.resurrected += leaving
        return admit(self, step, rows)

    return counting


def _counting_full_windows(has_room: Callable[..., bool], seen: Seen) -> Callable[..., bool]:
    def counting(self: Admissions, step: int, rows: np.ndarray) -> bool:
        room = has_room(self, step, rows)
        seen.full += not room
        return room

    return counting


def _counting_waits(being_written: Callable[..., bool], seen: Seen) -> Callable[..., bool]:
    def counting(self: Directory, slots: np.ndarray) -> bool:
        written = being_written(self, slots)
        seen.waited += written
        return written

    return counting
