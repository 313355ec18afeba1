"""Numbers on their way to the device, through memory that is allocated once.

N numbers of a call.
"""

from collections import deque

import torch
from torch import Tensor

from offload.device.streams import Event, Streams

_ALIGNED = 16
"""Numbers that a line is a multiple of: kernels are compiled anew for pointers of another alignment."""


class UploadRing:
    """A ring of pinned host memory, and one of the same size on the device. All work is given to one stream.

    Args:
        streams: of the device.
        device: where the numbers go.
        capacity: int64 numbers that the ring holds. The host waits when it asks for the place of numbers that the
            device still needs, so it should hold all calls that may be under way.
    """

    @staticmethod
    def size(parts: int, count: int) -> int:
        """Numbers that a call with `parts` tensors of `count` takes of a ring."""
        return parts * -(-count // _ALIGNED) * _ALIGNED

    def __init__(self, streams: Streams, device: torch.device, capacity: int) -> None:
        self._here = streams.pinned(capacity, dtype=torch.int64)
        self._there = torch.empty(capacity, dtype=torch.int64, device=device)
        self._end = 0
        self._put = range(0)
        self._taken: deque[tuple[range, Event]] = deque()

    def put(self, *parts_N: Tensor) -> tuple[Tensor, ...]:
        """Sends int64 tensors [N] of one length by the current stream. They are overwritten by later calls.

        Returns:
            int64 [N] each, on the device. `keep_until` must follow when the stream was given their last use.
        """
        count = len(parts_N[0])
        self._put = place = self._place(self.size(len(parts_N), count))
        here, there = (ring[place.start : place.stop].view(len(parts_N), -1) for ring in (self._here, self._there))
        for line_N, part_N in zip(here, parts_N, strict=True):
            line_N[:count].copy_(part_N)
        # With the gaps between the lines: a copy of several pieces would not be asynchronous.
        there.copy_(here, non_blocking=True)
        return tuple(line_N[:count] for line_N in there)

    def keep_until(self, event: Event) -> None:
        """The numbers of the last call are in use until this event."""
        self._taken.append((self._put, event))

    def _place(self, size: int) -> range:
        if size > len(self._here):
            raise ValueError(f"{size} numbers for a ring of {len(self._here)}")
        # Calls of few numbers, or none, would keep their events for as long as the ring takes to come round.
        while self._taken and self._taken[0][1].query():
            self._taken.popleft()
        start = self._end if self._end + size <= len(self._here) else 0
        place = range(start, start + size)
        # In the order of one stream, whatever was taken before a place that is free again is free too.
        overlapping = [n for n, (taken, _) in enumerate(self._taken) if taken.start < place.stop and start < taken.stop]
        if overlapping:
            self._taken[overlapping[-1]][1].synchronize()
        for _ in range(overlapping[-1] + 1 if overlapping else 0):
            self._taken.popleft()
        self._end = place.stop
        return place
