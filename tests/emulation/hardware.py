"""The hardware numbers of launch/plan/hardware.yaml, and how fast work proceeds beside other work.

What the keys mean is said in the file; all times in seconds.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, Field

from tests.emulation.clock import Rate, Span

FILE = Path(__file__).parents[2] / "launch/plan/hardware.yaml"
MODEL, OPTIMIZER, FETCH, WRITE_BACK = "model", "optimizer", "fetch", "write-back"
COPIES = (FETCH, WRITE_BACK)
_MEASURED_PROGRAMS = 8
THREADS = ("loop", "engram-window", "engram-plan")


class _Numbers(BaseModel, extra="forbid", frozen=True):
    pass


class Device(_Numbers):
    flops_per_second: float = Field(gt=0)
    memory_bytes_per_second: float = Field(gt=0)
    exchange_bytes_per_second: float = Field(gt=0)


class Link(_Numbers):
    copy_engine_bytes_per_second: float = Field(gt=0)
    fetch_bytes_per_second: float = Field(gt=0)
    write_back_bytes_per_second: float = Field(gt=0)
    write_back_with_4_programs: float = Field(gt=0, le=1)
    both_directions: float = Field(gt=0, le=1)
    beside_model: float = Field(gt=0, le=1)
    lost_to_copies: float = Field(ge=0, lt=1)


class Host(_Numbers):
    launch_seconds: float = Field(ge=0)
    lost_to_each_thread: float = Field(ge=0, lt=0.5)
    factor: float = Field(ge=0)


class Rows(_Numbers):
    read_seconds: float = Field(ge=0)
    update_seconds: float = Field(ge=0)
    draw_seconds: float = Field(ge=0)


class Backbone(_Numbers):
    optimizer_bytes: float = Field(ge=0)
    optimizer_launches: int = Field(ge=0)


class Hardware(_Numbers):
    """One machine's numbers."""

    device: Device
    link: Link
    host: Host
    rows: Rows
    backbone: Backbone

    def copy_seconds(self, what: str, nbytes: float, programs: int) -> float:
        """Of a copy of records by kernels, alone."""
        if what == FETCH:
            return nbytes / self.link.fetch_bytes_per_second
        slower = self.link.write_back_with_4_programs if programs <= 4 else 1.0
        return nbytes / self.link.write_back_bytes_per_second / slower

    def rate(self, programs: int) -> Rate:
        """What work beside each other does to its speed, with copies of so many programs."""
        link, lost = self.link, self.link.lost_to_copies * programs / _MEASURED_PROGRAMS

        def of(span: Span, running: Sequence[Span]) -> float:
            kinds = {each.what for each in running}
            if span.what == MODEL:
                return 1 - lost if kinds.intersection(COPIES) else 1.0
            if span.what in COPIES:
                both = link.both_directions if kinds.issuperset(COPIES) else 1.0
                return both * (link.beside_model if MODEL in kinds else 1.0)
            if span.where == "loop":
                others = sum(each.where in THREADS for each in running) - 1
                return 1 - self.host.lost_to_each_thread * others
            return 1.0

        return of


def read_hardware(machine: str, file: Path = FILE) -> Hardware:
    """The numbers of a machine.

    Raises:
        ValueError: there is no such machine, or a number is missing or wrong (pydantic's error names its key).
    """
    machines = yaml.safe_load(file.read_text(encoding="utf-8"))
    if machine not in machines:
        raise ValueError(f"{file} has no machine {machine!r}: it has {', '.join(machines)}")
    return Hardware.model_validate(machines[machine])
