"""How long the loop waits for rows, by look-ahead.

With c the step without waiting, p to plan, q to decide on slots, f to fetch and w to write back (seconds per step; f
and w share the bus, and are as slow as that makes them), the time from step to step on a GPU, where a thread decides,
is the largest of

    depth 0    c + q + f          and w, p: no part of the fetch is hidden by a step
    depth d    c, p, q, f, w      each is done once a step by somebody who does one thing at a time
               (q + w + f) / d    a step's rows come when others have left, within the d steps that they are ahead

On a processor the loop decides itself, between two steps: a fetch whose room is still being written back then waits for
the next such moment, and a window with room for little more than a step's rows can write back nothing before. There its
rules are followed with steps that are all alike. For f = w = 0.345 c and ample room they say 41, 26, 0 and 0 % of the
step at depths 0, 1, 2 and 4; measured were 41.0, 25.1, 0.0 and 0.0 (docs/performance.md, "Stall by look-ahead").
"""

from collections import deque
from dataclasses import dataclass

_STEPS, _COUNTED = 64, 32


@dataclass(frozen=True)
class Stages:
    """Seconds of a step's stages beside the loop, and `step` of the loop itself.

    `room` is None where a thread decides on slots; where the loop does, the slots that a step leaves to others, as a
    multiple of those that a step fills.
    """

    step: float
    plan: float
    decide: float
    fetch: float
    write_back: float
    room: float | None = None

    def period(self, depth: int) -> float:
        """Seconds from one step to the next at a look-ahead."""
        if self.room is not None:
            return max(self.plan, _Loop(self, self.room).period(depth))
        move = self.decide + self.write_back + self.fetch
        if depth == 0:
            return max(self.step + self.decide + self.fetch, self.plan, self.write_back)
        return max(self.step, self.plan, self.decide, self.fetch, self.write_back, move / depth)

    def stall(self, depth: int) -> float:
        """Seconds that the loop waits in each step."""
        return self.period(depth) - self.step


class _Loop:
    """What `EngramTables` and `Admissions` do on a processor, on a clock. Slots are counted in those of a step."""

    def __init__(self, stages: Stages, room: float) -> None:
        self._stages = stages
        self._now = self._fetcher = self._writer = 0.0
        self._free, self._unused = 1.0 + room, 0.0
        self._leaving: deque[tuple[float, float]] = deque()  # when they land, and slots
        self._waiting: deque[int] = deque()
        self._fetched: dict[int, float] = {}
        self._prepared = -1

    def period(self, depth: int) -> float:
        """Seconds from step to step, once they repeat."""
        begun = []
        for step in range(_STEPS):
            self._prepare(step)
            self._admit(step)
            self._now = max(self._now, self._fetched.pop(step))
            begun.append(self._now)
            self._prepare(step + depth)
            self._now += self._stages.step
            self._release()
        return (begun[-1] - begun[-1 - _COUNTED]) / _COUNTED

    def _prepare(self, last: int) -> None:
        for step in range(self._prepared + 1, last + 1):
            self._prepared = step
            self._waiting.append(step)
            self._admit()

    def _admit(self, needed: int = -1) -> None:
        """Steps in their order while there is room; for those up to `needed`, the loop waits for it."""
        while self._waiting:
            while self._leaving and self._leaving[0][0] <= self._now:
                self._land()
            self._make_room()
            while self._free < 1.0 - 1e-9:
                if self._waiting[0] > needed:
                    return
                self._land()
                self._make_room()
            self._free -= 1.0
            self._fetcher = max(self._fetcher, self._now) + self._stages.fetch
            self._fetched[self._waiting.popleft()] = self._fetcher

    def _make_room(self) -> None:
        slots = min(1.0 - self._free - sum(slots for _, slots in self._leaving), self._unused)
        if slots > 1e-9:
            self._unused -= slots
            self._writer = max(self._writer, self._now) + slots * self._stages.write_back
            self._leaving.append((self._writer, slots))

    def _land(self) -> None:
        when, slots = self._leaving.popleft()
        self._now, self._free = max(self._now, when), self._free + slots

    def _release(self) -> None:
        self._unused += 1.0
        self._make_room()
        self._admit()


def least_depth(stages: Stages, depths: tuple[int, ...] = (0, 1, 2, 4), share: float = 0.005) -> int:
    """The smallest look-ahead whose stall is within `share` of the step of that which waits least."""
    least = min(map(stages.period, depths))
    return next(depth for depth in depths if stages.period(depth) <= least + share * stages.step)
