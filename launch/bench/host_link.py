"""Host memory and device memory with records of any size in both, and the link between them.

R rows in host memory, C slots on the device, W words of a record, U rows of a copy.
"""

import torch
from torch import Tensor

from launch.bench.clock import Clock
from offload.host.pinned import CudaDriver
from offload.host.table import HostTable

_COPY_BYTES = 256 << 20


class HostLink:
    """One piece of host memory, pinned where the device is a GPU, and one of device memory.

    Their words start as 1, and so do the versions of records of any size: rows that were updated, whose fetch draws no
    initial values.

    Args:
        device: on the other side. With a CPU both sides are host memory.
        host_bytes: in host memory.
        device_bytes: on the device.

    Raises:
        Unavailable: host memory does not suffice, or the system pins none for the GPU.
    """

    def __init__(self, device: torch.device, host_bytes: int, device_bytes: int) -> None:
        self.device, self._on_gpu = device, device.type == "cuda"
        self._table = HostTable(host_bytes // 4, 1, touch_pages=True, device=device)
        self.host_N = self._table.records_RW.flatten()
        self.host_N.view(torch.int32).fill_(1)
        # As the device sees it.
        self.seen_N = self._table.pin(CudaDriver(device), device).flatten() if self._on_gpu else self.host_N
        self.device_N = torch.ones(device_bytes // 4, dtype=torch.int32, device=device).view(torch.float32)

    def host_records(self, words: int) -> Tensor:
        """All of host memory as records, as the device sees it: fp32 [R, W]."""
        return _records(self.seen_N, words)

    def device_records(self, words: int) -> Tensor:
        """All of device memory as records: fp32 [C, W]."""
        return _records(self.device_N, words)

    def draw_rows(self, count: int, words: int, *, ordered: bool) -> Tensor:
        """Distinct rows, spread over all of host memory: int64 [U], on the device.

        Args:
            count: at most as many as there are.
            words: of a record.
            ordered: ascending, or in random order.
        """
        each = self.host_N.numel() // words // count
        generator = torch.Generator().manual_seed(0)
        drawn_U = torch.arange(count) * each + torch.randint(each, (count,), generator=generator)
        return (drawn_U if ordered else drawn_U[torch.randperm(count, generator=generator)]).to(self.device)

    def draw_slots(self, count: int) -> Tensor:
        """The first slots, in random order: int64 [U], on the device."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(1)).to(self.device)

    def copy_rate(self, clock: Clock, *, to_device: bool) -> float:
        """Bytes per second of one large copy, by the copy engine where the device is a GPU: the median."""
        words = min(_COPY_BYTES // 4, len(self.host_N), len(self.device_N))
        host, device = self.host_N[:words], self.device_N[:words]
        target, source = (device, host) if to_device else (host, device)
        return source.nbytes / (1e-3 * clock.time(lambda: target.copy_(source, non_blocking=True)).median)

    def close(self) -> None:
        """Releases the memory."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        self._table.close()


def _records(words_N: Tensor, words: int) -> Tensor:
    rows = words_N.numel() // words
    return words_N[: rows * words].view(rows, words)
