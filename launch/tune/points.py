"""The settings that are tried: points, and which of them are worth a trial."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from launch.plan.rows.traffic import DEPTHS, SNUG, Replayed
from offload.config import OffloadConfig
from offload.engines import ENGINES
from offload.tables import FIRST_DEPTH

_APART = 1.1  # times: windows nearer to each other are taken as one
_THREADS = (1, 2, 4)
_PROGRAMS = (4, 8, 16)


@dataclass(frozen=True)
class Point:
    """Settings of `offload` that change no result, by their names there."""

    depth: int
    window_rows: int
    engine: str
    planner_threads: int
    programs: int | None

    @classmethod
    def of(cls, config: OffloadConfig) -> "Point":
        """What a config says; with `depth: auto`, what a run begins with."""
        depth = FIRST_DEPTH if config.depth == "auto" else config.depth
        return cls(depth, config.window_rows, config.engine, config.planner_threads, config.programs)

    def apply(self, config: OffloadConfig) -> OffloadConfig:
        """The config with these settings."""
        return config.model_copy(update=asdict(self))

    def changes(self, config: OffloadConfig, engine: str) -> dict[str, Any]:
        """The settings that differ from a config's, with which `engine` carries the rows here."""
        here = config if config.engine != "auto" else config.model_copy(update={"engine": engine})
        return {name: value for name, value in asdict(self).items() if value != getattr(here, name)}

    @property
    def build(self) -> tuple[int, str, int | None]:
        """What takes a new window to change."""
        return self.window_rows, self.engine, self.programs

    @property
    def cost(self) -> tuple[int, int, int]:
        """By which of two equally fast ones is chosen: memory of the device, memory of plans, cores."""
        return self.window_rows, self.depth, self.planner_threads

    def __str__(self) -> str:
        programs = "" if self.programs is None else f", {self.programs} programs"
        threads = "" if self.planner_threads == 1 else f", {self.planner_threads} planner threads"
        return f"depth {self.depth}, window {self.window_rows:,}, {self.engine}{programs}{threads}"


def snug_windows(replayed: Replayed, shard_rows: int) -> dict[int, int]:
    """By look-ahead, slots for the rows that it needs at once and a quarter more."""
    return {
        depth: min(shard_rows, math.ceil(SNUG * max(owner.unions[depth] for owner in replayed.owners)))
        for depth in DEPTHS
        if all(depth in owner.unions for owner in replayed.owners)
    }


def windows(snug: dict[int, int], shard_rows: int, room_rows: int, configured: int) -> list[int]:
    """Windows to try, ascending: those of each look-ahead, one twice as large, and the configured one.

    Args:
        snug: by look-ahead.
        shard_rows: of the largest shard; no window needs more.
        room_rows: for which a device has room.
        configured: in the config.
    """
    wanted = sorted({*snug.values(), min(shard_rows, 2 * max(snug.values()))})
    kept = [min(configured, shard_rows)]
    for rows in wanted:
        if rows <= room_rows and all(max(rows, other) >= _APART * min(rows, other) for other in kept):
            kept.append(rows)
    return sorted(kept)


def grid(start: Point, snug: dict[int, int], sizes: Iterable[int], *, every: bool) -> list[Point]:
    """Look-aheads and windows: those that hold what the look-ahead needs, or, with `every`, all of them.

    The windows come one after another, the configured one first, and the configured point is among them.
    """
    return [
        point
        for rows in sorted(sizes, key=lambda rows: (rows != start.window_rows, rows))
        for depth in snug
        if every or rows >= snug[depth] or (point_of(start, depth, rows) == start)
        for point in [point_of(start, depth, rows)]
    ]


def point_of(start: Point, depth: int, rows: int) -> Point:
    """The start's with another look-ahead and window."""
    return replace(start, depth=depth, window_rows=rows)


def engines(best: Point, possible: Sequence[str]) -> list[Point]:
    """The point with each engine, and with other numbers of programs where kernels alone carry the rows."""
    others = [replace(best, engine=name, programs=None) for name in possible]
    by_kernels = [name for name in possible if not ENGINES[name].stages]
    counts = [replace(best, engine=name, programs=count) for name in by_kernels for count in _PROGRAMS]
    return list(dict.fromkeys([best, *others, *counts])) if possible else []


def planners(best: Point, cores: int) -> list[Point]:
    """The point with more planner threads, as far as a rank has cores."""
    counts = [count for count in _THREADS if count <= cores]
    return list(dict.fromkeys([best, *(replace(best, planner_threads=count) for count in counts)]))
