"""The hardware numbers of launch/plan/hardware.yaml, and how fast work proceeds beside other work.

What the keys mean is said in the file; all times in seconds.
"""

from collections.abc import Sequence
from pathlib import Path

from launch.plan import hardware
from launch.plan.hardware import read_catalogue
from tests.emulation.clock import Rate, Span

MODEL, OPTIMIZER, FETCH, WRITE_BACK = "model", "optimizer", "fetch", "write-back"
COPIES = (FETCH, WRITE_BACK)
"""By kernels."""
CARRIED_IN, CARRIED_OUT = "carried in", "carried out"
"""By copy engines, which take nothing from the model."""
_MEASURED_PROGRAMS = 8
STAGING = ("engram-fetch", "engram-writeback")
THREADS = ("loop", "engram-window", "engram-plan", *STAGING)


class Hardware(hardware.Hardware):
    """One machine's numbers."""

    def copy_seconds(self, what: str, nbytes: float, programs: int) -> float:
        """Of a copy of records by kernels, alone."""
        if what == FETCH:
            return nbytes / self.link.fetch_bytes_per_second
        slower = self.link.write_back_with_4_programs if programs <= 4 else 1.0
        return nbytes / self.link.write_back_bytes_per_second / slower

    def staging_seconds(self, nbytes: float, *, gathered: bool) -> float:
        """Of records gathered from host memory by the CPU, or put there."""
        rate = self.host.gather_bytes_per_second if gathered else self.host.scatter_bytes_per_second
        return nbytes / rate / self.host.staging_cores

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


def read_hardware(machine: str, file: Path | None = None) -> Hardware:
    """The numbers of a machine, of a file that is laid over the project's if there is one.

    Raises:
        ValueError: there is no such machine, or a number is missing or wrong.
    """
    return Hardware.model_validate(read_catalogue(file).gpu(machine).model_dump())
