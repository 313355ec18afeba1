"""Sends numbers to the device ahead of their use, so that nobody waits for them.

Memory on both sides is torch's, which reuses it for later sends once the device is done with it: after a few steps
nothing is allocated, and only the look-ahead limits how much is in flight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from offload.device.streams import Event, Stream, Streams, numbered, streams_of


class Sender:
    """Sends tensors to a device; if that is the CPU, they are already there.

    Args:
        device: where to.
        streams: of the device.
        stream: the one that sends; by default one of the sender's own.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None, stream: Stream | None = None) -> None:
        self._device = numbered(device)
        self._streams = streams or streams_of(self._device)
        self._stream = stream or self._streams.new()

    def pinned(self, tensor: Tensor) -> Tensor:
        """The tensor in memory that the device copies by itself, or in the device's own; a copy if it is in neither."""
        return self._streams.pin(tensor)

    def packed(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Vectors of one dtype as one, which the device copies by itself; None if it reads them as they are."""
        if all(map(self._streams.reads, tensors)):
            return None
        packed = self._streams.pinned(sum(map(len, tensors)), dtype=tensors[0].dtype)
        return torch.cat(list(tensors), out=packed)

    def send(self, *tensors: Tensor) -> "Sent":
        """Starts to send tensors; those that are not pinned are copied into pinned memory first.

        Those that are on the device already must be complete, and are not copied.
        """
        with self._streams.use(self._stream):
            there = tuple(self.pinned(tensor).to(self._device, non_blocking=True) for tensor in tensors)
        return Sent(there, self._stream.record_event(), self._streams)


class Sent:
    """Tensors that were sent, by a stream of the sender.

    Args:
        tensors: on the device.
        landed: an event behind the last of them.
        streams: of the device.
    """

    def __init__(self, tensors: tuple[Tensor, ...], landed: Event, streams: Streams) -> None:
        self._tensors, self._landed, self._streams = tensors, landed, streams

    def take(self) -> tuple[Tensor, ...]:
        """The tensors, for work that the caller's stream is given from now on."""
        self._streams.current().wait_event(self._landed)
        for tensor in self._tensors:
            # Made on the sender's stream: its memory must not be reused while the caller's still reads it.
            self._streams.lend(tensor)
        return self._tensors
