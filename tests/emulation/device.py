"""The seams of `offload.device` over virtual time: streams, marks in them, and threads beside the loop."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.emulation.clock import HostThread, Simulation, Span


class VirtualEvent:
    """A mark in a stream: see `offload.device.streams.Event`."""

    def __init__(self, simulation: Simulation, span: Span) -> None:
        self._simulation, self.span = simulation, span

    def query(self) -> bool:
        self._simulation.charge()
        return self.span.done

    def synchronize(self) -> None:
        self._simulation.charge()
        self._simulation.wait(self.span)


class VirtualStream:
    """Work in order: see `offload.device.streams.Stream`."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self._simulation, self.name = simulation, name
        self.last = simulation.thread.last
        self._waits: list[Span] = []

    def record_event(self) -> VirtualEvent:
        self._simulation.charge()
        return VirtualEvent(self._simulation, self.launch("mark", 0.0) if self._waits else self.last)

    def wait_event(self, event: VirtualEvent) -> None:
        self._simulation.charge()
        self._waits.append(event.span)

    def launch(self, what: str, seconds: float) -> Span:
        """Work behind all that the stream was given."""
        span = Span(self.name, what, seconds)
        self._simulation.submit(span, [self.last, *self._waits])
        self._waits, self.last = [], span
        return span


class VirtualStreams:
    """The streams of a device: see `offload.device.streams.Streams`.

    Args:
        simulation: whose time it is.
        numbers: called with the bytes of a tensor that the current stream is to send: gives the device that work.
    """

    def __init__(self, simulation: Simulation, numbers: Callable[[int], None] = lambda _: None) -> None:
        self._simulation, self._numbers = simulation, numbers
        self.compute = VirtualStream(simulation, "compute")
        self._made = 0

    def new(self) -> VirtualStream:
        self._made += 1
        return VirtualStream(self._simulation, f"stream {self._made}")

    def current(self) -> VirtualStream:
        stream: VirtualStream | None = self._simulation.thread.current
        return stream or self.compute

    @contextmanager
    def use(self, stream: VirtualStream) -> Iterator[None]:
        thread = self._simulation.thread
        before, thread.current = thread.current, stream
        yield
        thread.current = before

    def reads(self, tensor: Tensor) -> bool:
        return False

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(*shape, dtype=dtype)
        tensor.is_pinned_in_emulation = True  # type: ignore[attr-defined]
        return tensor

    def pin(self, tensor: Tensor) -> Tensor:
        if not getattr(tensor, "is_pinned_in_emulation", False):
            tensor = tensor.clone()
            tensor.is_pinned_in_emulation = True  # type: ignore[attr-defined]
        if self._simulation.thread.current is not None:  # the sender is about to send it
            self._numbers(tensor.nbytes)
        return tensor

    def lend(self, tensor: Tensor) -> None:
        pass


class VirtualFuture(Future):  # type: ignore[type-arg]
    """What a virtual worker is going to have done."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation
        self.sleepers: list[HostThread] = []

    def done(self) -> bool:
        self._simulation.charge()
        return super().done()

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self._simulation.sleep(self.sleepers)
        return super().result(timeout)


class VirtualWorker(Executor):
    """A thread that does one thing after another: see `offload.device.workers.background_worker`."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self._simulation = simulation
        self._jobs: deque[tuple[VirtualFuture, Callable[[], Any]]] = deque()
        self._idle: list[HostThread] = []
        self._joining: list[HostThread] = []
        self._closed = self._over = False
        self._real = simulation.spawn(name, self._serve)

    def submit(self, work: Callable[..., Any], /, *args: Any, **keywords: Any) -> VirtualFuture:
        self._simulation.charge()
        future = VirtualFuture(self._simulation)
        self._jobs.append((future, lambda: work(*args, **keywords)))
        self._simulation.wake(self._idle)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if cancel_futures:
            self._jobs.clear()
        self._closed = True
        self._simulation.wake(self._idle)
        if not self._over:
            self._simulation.sleep(self._joining)
        self._real.join()

    def _serve(self) -> None:
        torch.set_num_threads(1)
        while self._jobs or not self._closed:
            if not self._jobs:
                self._simulation.sleep(self._idle)
                continue
            future, work = self._jobs.popleft()
            try:
                result = work()
                self._simulation.charge()
                future.set_result(result)
            except BaseException as error:
                future.set_exception(error)
            self._simulation.wake(future.sleepers)
        self._over = True
        self._simulation.wake(self._joining)
