"""The parts of the benchmark by name, and on how many ranks each is measured."""

from collections.abc import Callable
from dataclasses import dataclass

from launch.bench.checkpoint.part import measure_checkpoint
from launch.bench.data import measure_data
from launch.bench.kernels.part import measure_kernels
from launch.bench.links.part import measure_links
from launch.bench.options import BenchOptions
from launch.bench.path.part import measure_path
from launch.bench.planning import measure_planning
from launch.bench.report import Section
from launch.bench.scaling import measure_scaling
from launch.bench.stall.disk import measure_disk_stall
from launch.bench.stall.part import measure_stall
from launch.bench.training.part import measure_training
from train.progress import Progress


@dataclass(frozen=True)
class Part:
    """One part. `measure` runs on every rank; the first one's section counts."""

    measure: Callable[[BenchOptions, Progress], Section]
    ranks: tuple[int, ...] = (1,)
    on_gpu: bool = True
    """Whether it is measured on the GPU, where there is one and the options say so."""
    trains: bool = False
    """Whether its ranks are as many as the job's."""
    has_engine: bool = False
    """Whether its ranks are joined as for training."""


PARTS = {
    "path": Part(measure_path),
    "scaling": Part(measure_scaling),
    "planning": Part(measure_planning),
    "stall": Part(measure_stall, ranks=(1, 2), on_gpu=False),
    "disk": Part(measure_disk_stall, on_gpu=False),
    "kernels": Part(measure_kernels),
    "links": Part(measure_links),
    "checkpoint": Part(measure_checkpoint, on_gpu=False, has_engine=True),
    "data": Part(measure_data, on_gpu=False),
    "train": Part(measure_training, trains=True, has_engine=True),
}
"""Each is measured on ranks of its own."""
