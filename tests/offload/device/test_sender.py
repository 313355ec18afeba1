"""Numbers on their way to a device: pinned, on a stream of their own, and there before whoever takes them reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from offload.device.sender import Sender
from offload.device.streams import HostStreams

CPU = torch.device("cpu")


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def record_event(self) -> str:
        self.log.append(f"{self.name} marks")
        return self.name

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")


class Streams(HostStreams):
    """Notes what a device is given, and by which stream."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._current = Stream("model", self.log)

    def new(self) -> Any:
        return Stream("sender", self.log)

    def current(self) -> Any:
        return self._current

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def pin(self, tensor: Tensor) -> Tensor:
        self.log.append(f"{self._current.name} pins {len(tensor)}")
        return tensor.clone()

    def lend(self, tensor: Tensor) -> None:
        self.log.append(f"{self._current.name} borrows {len(tensor)}")


def test_numbers_are_sent_by_a_stream_of_the_senders_and_waited_for_by_the_callers_alone() -> None:
    streams = Streams()
    sent = Sender(CPU, streams).send(torch.arange(3), torch.arange(5))
    assert streams.log == ["sender pins 3", "sender pins 5", "sender marks"]
    three, five = sent.take()
    assert streams.log[3:] == ["model waits for sender", "model borrows 3", "model borrows 5"]
    assert three.tolist() + five.tolist() == [*range(3), *range(5)]


def test_what_was_sent_is_as_it_was_then() -> None:
    """On a device, whose copy is not the caller's memory."""
    streams, numbers = Streams(), torch.arange(4)
    sent = Sender(CPU, streams, Stream("in", streams.log)).send(numbers)  # type: ignore[arg-type]
    numbers.zero_()
    (there,) = sent.take()
    assert there.tolist() == [0, 1, 2, 3]
    assert streams.log[:2] == ["in pins 4", "in marks"]


def test_on_a_cpu_nothing_is_copied() -> None:
    numbers = torch.arange(4)
    (there,) = Sender(CPU).send(numbers).take()
    assert there is numbers
