"""What is emulated otherwise than the code has it, and what a run came to."""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from kernels.records import PROGRAMS
from tests.emulation.clock import Span


@dataclass(frozen=True)
class Variant:
    """What is emulated otherwise than the code has it; by default nothing.

    Attributes:
        engine: that carries rows.
        decided_in_loop: the loop decides on the window's slots.
        programs: of each copy.
        values_aside: rows are read, and their values exchanged, on a side stream until the first Engram layer.
        gradients_late: gradients go to their owners when the whole backward is done.
        rows_before_backbone: rows are updated before the backbone, whose optimizer write-backs and fetches go under.
    """

    engine: str = "zero_copy"
    decided_in_loop: bool = False
    programs: int = PROGRAMS
    values_aside: bool = False
    gradients_late: bool = False
    rows_before_backbone: bool = False

    @property
    def resident(self) -> "Variant":
        """What of it there is to change where all rows are resident."""
        return replace(self, engine=TODAY.engine, decided_in_loop=False, programs=PROGRAMS)


TODAY = Variant()


@dataclass(frozen=True)
class StepReport:
    """One step.

    Attributes:
        seconds: from the end of the last step's last work on the device to the end of this one's.
        path: what they were spent on; the sum is `seconds`.
        stall: the loop waited for plans and rows, as the tables count it.
        rows, fetched, written: that the step needed, and that travelled meanwhile.
        copied: seconds that copies of rows were under way.
    """

    seconds: float
    path: Counter[str]
    stall: float
    rows: int
    fetched: int
    written: int
    copied: float


@dataclass(frozen=True)
class Access:
    """What a span reads and writes: rows of host memory, or slots."""

    span: Span
    reads: tuple[str, Tensor]
    writes: tuple[str, Tensor]


@dataclass
class Run:
    """The steps of a run that count, and the gradient's norms of all, bit by bit; accesses of all, if asked for."""

    steps: list[StepReport] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of a step: the mean, so that the parts add up."""
        return statistics.fmean(step.seconds for step in self.steps)

    @property
    def path(self) -> Counter[str]:
        """Of a step: means."""
        total: Counter[str] = Counter()
        for step in self.steps:
            total.update(step.path)
        return Counter({kind: seconds / len(self.steps) for kind, seconds in total.items()})

    def mean(self, of: Callable[[StepReport], float]) -> float:
        """Of a step."""
        return statistics.fmean(map(of, self.steps))
