"""The parts of the benchmark by name, and on how many ranks each is measured."""

from collections.abc import Callable
from dataclasses import dataclass

from launch.bench.options import BenchOptions
from launch.bench.path import measure_path
from launch.bench.planning import measure_planning
from launch.bench.progress import Progress
from launch.bench.report import Section
from launch.bench.scaling import measure_scaling
from launch.bench.stall import measure_stall


@dataclass(frozen=True)
class Part:
    """One part. `measure` runs on every rank; the first one's section counts."""

    measure: Callable[[BenchOptions, Progress], Section]
    ranks: tuple[int, ...] = (1,)


PARTS = {
    "path": Part(measure_path),
    "scaling": Part(measure_scaling),
    "planning": Part(measure_planning),
    "stall": Part(measure_stall, ranks=(1, 2)),
}
"""Parts that are measured on ranks of their own."""
