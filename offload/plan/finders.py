"""Finds which rows a step's lookups read: on the CPU, or on the device that will read them.

Both give the same tensors bit for bit. Shape suffixes as in `offload.plan.plan`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor

from kernels.deduplicate import deduplicate
from kernels.deduplicate.together import deduplicate_together
from offload.addresses.hashing import AddressBook
from offload.device.sender import Sender
from offload.device.streams import streams_of
from offload.errors import Unavailable
from offload.plan.plan import Found, Owed, RowFinder, TokenBatch

_PLANNING = ("cuda",)
"""Devices that may plan."""


def open_finder(planner: str, addresses: AddressBook, device: torch.device) -> RowFinder:
    """The finder that `offload.planner` asks for.

    Args:
        planner: `cpu`, `device` or `auto`.
        addresses: from token ids to rows.
        device: where the model computes.

    Raises:
        Unavailable: `device`, where the model computes on the CPU.
    """
    if planner != "device":
        return HostFinder(addresses)
    if device.type not in _PLANNING:
        raise Unavailable(f"offload.planner=device needs a GPU, but the model is on {device}: set it to auto")
    return DeviceFinder(addresses, device)


class HostFinder:
    """Finds rows on the CPU.

    Args:
        addresses: from token ids to rows.
    """

    def __init__(self, addresses: AddressBook) -> None:
        self._addresses = addresses

    def of_batches(self, batches: Sequence[TokenBatch]) -> list[Found]:
        """See `RowFinder.of_batches`."""
        rows = [self._addresses.all_rows(batch.tokens_BT, batch.positions_BT) for batch in batches]
        return [deduplicate(of_module) for of_module in zip(*rows, strict=True)]

    def owed(self, rows_A: Tensor, world_size: int) -> Owed:
        """See `RowFinder.owed`."""
        return _alone(rows_A, rows_A.device) if world_size == 1 else _among_ranks(deduplicate([rows_A]))


class DeviceFinder:
    """Finds rows on a device, on a stream of the lowest priority.

    Token ids go there, and the rows that ranks request from this one; unique rows and the number of each micro-batch's
    segments come back, through pinned memory. The calling thread waits until all is done, so that nobody else has to.

    The device's memory: 4 bytes for each lookup of a step and 84 for each of one module, besides the indices that are
    returned, of 16 at most (8 and 92, if a table has 2^31 rows), and the temporaries of torch's operations. torch keeps
    it for the next plan.

    Args:
        addresses: from token ids to rows.
        device: the device.
    """

    def __init__(self, addresses: AddressBook, device: torch.device) -> None:
        self._device, self._addresses, self._there = device, addresses, addresses.on(device)
        self._streams = streams_of(device)
        self._stream = self._streams.new()
        self._sender = Sender(device, self._streams, self._stream)
        most_rows = max(addresses.num_rows(module) for module in range(addresses.num_modules))
        # Sorted in half the time, and half the bytes on the bus.
        self._dtype = torch.int32 if most_rows <= 2**31 else torch.int64

    def of_batches(self, batches: Sequence[TokenBatch]) -> list[Found]:
        """See `RowFinder.of_batches`."""
        with self._finished():
            rows = [self._rows(batch) for batch in batches]
            return [self._deduplicate(of_module) for of_module in zip(*rows, strict=True)]

    def owed(self, rows_A: Tensor, world_size: int) -> Owed:
        """See `RowFinder.owed`."""
        with self._finished():
            if world_size == 1:
                return _alone(rows_A, self._device)
            return _among_ranks(self._deduplicate([self._send(rows_A.to(self._dtype))]))

    @contextmanager
    def _finished(self) -> Iterator[None]:
        """Inside, the device's work goes to the stream; it is done at the end."""
        with self._streams.use(self._stream):
            yield
        self._stream.record_event().synchronize()

    def _rows(self, batch: TokenBatch) -> Tensor:
        self._addresses.check(batch.tokens_BT)
        tokens_BT, positions_BT = self._send(batch.tokens_BT), self._send(batch.positions_BT)
        return self._there.all_rows(tokens_BT, positions_BT).to(self._dtype)

    def _deduplicate(self, rows: Sequence[Tensor]) -> Found:
        sizes = [part.numel() for part in rows]
        bounds_B = self._send(torch.tensor(list(accumulate(sizes, initial=0))))
        found = deduplicate_together(torch.cat([part.flatten() for part in rows]), bounds_B)
        unique_U, segments_B = self._to_host(found.unique_U, found.segments_B)
        return unique_U.to(torch.int64), found.indices(sizes, segments_B.tolist())

    def _send(self, tensor: Tensor) -> Tensor:
        # Memory that is not contiguous cannot be pinned as it is.
        (there,) = self._sender.send(tensor.contiguous()).take()
        return there

    def _to_host(self, *there: Tensor) -> list[Tensor]:
        copies = [self._streams.pinned(len(part), dtype=part.dtype).copy_(part, non_blocking=True) for part in there]
        self._stream.record_event().synchronize()
        return copies


def _alone(rows_O: Tensor, device: torch.device) -> Owed:
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    return Owed(rows_O, nothing, nothing, nothing)


def _among_ranks(found: Found) -> Owed:
    rows_O, (index,) = found
    # One segment per row, as every row is read.
    return Owed(rows_O, index.segment_N, index.order_N, index.offsets_V)
