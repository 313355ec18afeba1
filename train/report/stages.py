"""Where a step's time goes in the training loop: every moment belongs to one stage."""

import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from offload.spans import span

StepStage = Literal["plan", "fetch", "exchange", "forward", "backward", "reduce", "update", "other"]
"""`plan`, `fetch`: waiting for them. `exchange`: of values; `reduce`: of gradients, with the wait for their norm.
`update`: backbone and rows, and the release of rows, after which they are written back. On a GPU these are the host's
times: work that it gave to the device is waited for in `reduce`."""


class StageClock:
    """Adds up seconds by stage, and tells a profile that is being recorded."""

    def __init__(self) -> None:
        self._span: AbstractContextManager[object] = nullcontext()
        self.restart()

    def restart(self) -> None:
        """Forgets all times; what follows is `other`."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()
        self._stage: StepStage = "other"

    def enter(self, stage: StepStage) -> None:
        """The stage before ends, and this one begins."""
        now = time.perf_counter()
        self._seconds[self._stage] += now - self._since
        self._since, self._stage = now, stage
        self._span.__exit__(None, None, None)
        self._span = nullcontext() if stage == "other" else span("loop", stage)
        self._span.__enter__()

    def leave_out(self, seconds: float) -> None:
        """Leaves `seconds` of the present stage out of every stage."""
        self._since += seconds

    def seconds(self) -> dict[str, float]:
        """By stage, until now."""
        self.enter(self._stage)
        return dict(self._seconds)
