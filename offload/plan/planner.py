"""Plans coming steps on a thread of its own, keyed by step number."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from offload.device.workers import background_worker
from offload.plan.plan import Plan, TokenBatch
from offload.spans import span


class Planner:
    """Runs plans one after another, in the order of the requests, which must be the same on every rank.

    Args:
        make: plans the micro-batches of a step; collective.
        batches: this rank's micro-batches of a step, a pure function of the step number.
        device: where plans are sent to, from host memory that is pinned for it.
        threads: cores that planning may use.
    """

    def __init__(
        self,
        make: Callable[[Sequence[TokenBatch]], Plan],
        batches: Callable[[int], Sequence[TokenBatch]],
        device: torch.device,
        threads: int = 1,
    ) -> None:
        self._make, self._batches = make, batches
        self._thread = background_worker("engram-plan", device, threads)
        self._plans: dict[int, Future[Plan]] = {}
        self.busy_s = 0.0
        """Seconds that the thread has worked."""

    def request(self, step: int) -> None:
        """Starts to plan `step`, once."""
        if step not in self._plans:
            self._plans[step] = self._thread.submit(lambda: self._timed(self._batches(step)))

    def ready(self, step: int) -> bool:
        """Whether `step` was planned."""
        return step in self._plans and self._plans[step].done()

    def plan(self, step: int) -> Plan:
        """Waits for the plan of a requested step."""
        return self._plans[step].result()

    def settle(self) -> None:
        """Waits for everything that was requested, which ranks plan together. Collective."""
        self._thread.submit(lambda: None).result()

    def forget(self, step: int) -> None:
        """Drops the plan of a step that was finished."""
        del self._plans[step]

    def plan_now(self, batches: Sequence[TokenBatch]) -> Plan:
        """Plans micro-batches that belong to no training step, after the plans already requested. Collective."""
        return self._thread.submit(lambda: self._timed(batches)).result()

    def take_threads(self, threads: int) -> None:
        """From the next plan on, planning may take so many cores."""
        self._thread.submit(torch.set_num_threads, threads)

    def plan_once(self, step: int) -> Plan:
        """The plan of a step, behind those already asked for; it is not kept. Collective."""
        return self._thread.submit(lambda: self._timed(self._batches(step))).result()

    def close(self) -> None:
        """Waits for the plans that were requested, which ranks make together, and ends the thread. Collective."""
        self._thread.shutdown()

    def _timed(self, batches: Sequence[TokenBatch]) -> Plan:
        started = time.perf_counter()
        with span("plan"):
            plan = self._make(batches)
        self.busy_s += time.perf_counter() - started
        return plan
