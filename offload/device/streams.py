"""Queues of work on the device, and the marks by which one waits for another.

A GPU works through several streams at a time; the host only fills them. On a CPU there is one thread of work, which
has always finished what it was given: the same engines run there, with nothing to wait for.
"""

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A mark in a stream."""

    def query(self) -> bool:
        """Whether all work before the mark is done; never waits."""

    def synchronize(self) -> None:
        """The host waits until all work before the mark is done."""


class Stream(Protocol):
    """Work that is done in the order in which it was given."""

    def record_event(self) -> Event:
        """A mark behind the work given so far."""

    def wait_event(self, event: Any) -> None:
        """Work given from now on comes after the mark, an event of the same device. The host does not wait."""


class Streams(Protocol):
    """The streams of a device."""

    def new(self) -> Stream:
        """A stream of the lowest priority that the device has."""

    def current(self) -> Stream:
        """The stream that this thread gives its work to."""

    def use(self, stream: Stream) -> AbstractContextManager[object]:
        """Inside, this thread's work goes to `stream`."""

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised host memory that the device copies to and from without the host's help."""

    def pin(self, tensor: Tensor) -> Tensor:
        """A host tensor in such memory: a copy, if it is not there yet. A tensor on the device is returned as it is."""

    def reads(self, tensor: Tensor) -> bool:
        """Whether the device computes on a tensor where it is."""

    def lend(self, tensor: Tensor) -> None:
        """Keeps memory that was allocated on another stream from being reused before this thread's has read it."""


_spare: dict[torch.device, list[torch.cuda.Stream]] = {}
"""By GPU: streams that nobody uses any more."""


class CudaStreams:
    """The streams of an NVIDIA GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = numbered(device)

    def new(self) -> Stream:
        """See `Streams.new`."""
        # Not below the model's: it computes on the default stream, which has this priority too and cannot be changed.
        # Transfers would yield to it only if it ran on a stream of its own with a higher, negative priority.
        spare = _spare.setdefault(self._device, [])
        stream = spare.pop() if spare else torch.cuda.Stream(self._device, priority=0)
        # torch has 32, and then gives out the same ones again: windows opened anew would share theirs with others.
        lent = torch.cuda.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )
        weakref.finalize(lent, spare.append, stream)
        return lent

    def current(self) -> Stream:
        """See `Streams.current`."""
        return torch.cuda.current_stream(self._device)

    def use(self, stream: Stream) -> AbstractContextManager[object]:
        """See `Streams.use`."""
        assert isinstance(stream, torch.cuda.Stream)
        return torch.cuda.stream(stream)

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See `Streams.pinned`."""
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def pin(self, tensor: Tensor) -> Tensor:
        """See `Streams.pin`."""
        return tensor if tensor.is_cuda else tensor.pin_memory()

    def reads(self, tensor: Tensor) -> bool:
        """See `Streams.reads`."""
        return tensor.is_cuda

    def lend(self, tensor: Tensor) -> None:
        """See `Streams.lend`."""
        tensor.record_stream(torch.cuda.current_stream(self._device))


class _Done:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class _Immediate:
    def record_event(self) -> _Done:
        return _Done()

    def wait_event(self, event: Event) -> None:
        pass


class HostStreams:
    """A CPU's only stream: the calling thread."""

    def new(self) -> Stream:
        """See `Streams.new`."""
        return _Immediate()

    def current(self) -> Stream:
        """See `Streams.current`."""
        return _Immediate()

    def use(self, stream: Stream) -> AbstractContextManager[object]:
        """See `Streams.use`."""
        return nullcontext()

    def pinned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """See `Streams.pinned`."""
        return torch.empty(*shape, dtype=dtype)

    def pin(self, tensor: Tensor) -> Tensor:
        """See `Streams.pin`."""
        return tensor

    def reads(self, tensor: Tensor) -> bool:
        """See `Streams.reads`."""
        return True

    def lend(self, tensor: Tensor) -> None:
        """See `Streams.lend`."""


def numbered(device: torch.device) -> torch.device:
    """The device with its number: a GPU without one is the caller's current one, which may differ between threads."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def streams_of(device: torch.device) -> Streams:
    """The streams of a device."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
