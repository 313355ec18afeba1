"""Numbers on their way to the device, ahead of their use and by a stream of their own: nobody waits for them."""

from typing import Any

import torch
from torch import Tensor

from offload.device.streams import streams_of


class Sender:
    """Sends tensors to a device; where that is the CPU they are there.

    Args:
        device: where to; a GPU without a number is the caller's current one.
    """

    def __init__(self, device: torch.device) -> None:
        # Told apart here: another thread's current GPU may be another one.
        on_gpu = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else device
        self._streams = streams_of(self.device)
        self._stream = self._streams.new()

    def pinned(self, tensor: Tensor) -> Tensor:
        """The tensor in memory that a GPU copies by itself; a copy, if it is not in such memory yet."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def send(self, *tensors: Tensor) -> "Sent":
        """Starts to send tensors; those that are not pinned are copied into pinned memory first."""
        if self.device.type == "cpu":
            return Sent(tensors, None)
        with self._streams.use(self._stream):
            there = tuple(self.pinned(tensor).to(self.device, non_blocking=True) for tensor in tensors)
        return Sent(there, self._stream.record_event())


class Sent:
    """Tensors that were sent, by a stream of the sender.

    Args:
        tensors: on the device.
        landed: behind the last of them; None if they are there.
    """

    def __init__(self, tensors: tuple[Tensor, ...], landed: Any) -> None:
        self._tensors, self._landed = tensors, landed

    def take(self) -> tuple[Tensor, ...]:
        """The tensors, for work that the caller's stream is given from now on."""
        if self._landed is not None:
            for tensor in self._tensors:
                stream = torch.cuda.current_stream(tensor.device)
                stream.wait_event(self._landed)
                # Made on the sender's stream: their memory must not be given away while this one still reads it.
                tensor.record_stream(stream)
        return self._tensors
