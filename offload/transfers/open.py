"""What carries records between host memory and the window: one interface, three engines.

`zero_copy`: kernels that reach into pinned host memory. `staged`: the CPU gathers, the GPU's copy engines carry.
`cpu`: the window is in host memory too. All give the same bits.
"""

import logging
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from kernels.records import PROGRAMS
from offload.config import OffloadConfig
from offload.device.streams import Streams, streams_of
from offload.host.limits import local_ranks
from offload.host.memory import cores
from offload.host.pinned import CudaDriver, Driver, PinError
from offload.host.table import HostTable
from offload.rows.shard import Shard
from offload.transfers.copies import Copy
from offload.transfers.cpu import CpuTransfers
from offload.transfers.staged import StagedTransfers
from offload.transfers.zero_copy import ZeroCopyTransfers

_log = logging.getLogger(__name__)

_SAMPLE_ROWS = 1 << 16
_SAMPLES = 3
_MAX_STAGING_THREADS = 8


class Transfers(Protocol):
    """An engine. Copies of one direction land in the order in which they were asked for."""

    name: str
    """The engine's, as `offload.engine` calls it."""
    stream_ordered: bool
    """Whether `Copy.order_fetches` of a write-back never makes the host wait."""

    def fetch(self, rows: Tensor, slots: Tensor, stored: int) -> Copy:
        """Brings records of `rows` into `slots`: of the first `stored` from host memory, drawn of the others.

        It begins when what the caller's stream was given so far is done.

        Args:
            rows: places in the shard, int64, on the host.
            stored: how many of the rows were ever updated; they come first.
            slots: int64, on the host. Nobody may be copying them or these rows to host memory, unless that copy has
                landed or was told to come first (`Copy.order_fetches`).
        """

    def write_back(self, slots: Tensor, rows: Tensor) -> Copy:
        """Copies records of `slots` to `rows`. It begins when what the caller's stream was given so far is done."""

    def close(self) -> None:
        """Waits for what is under way and ends background work."""


def pins(config: OffloadConfig, device: torch.device) -> bool:
    """Whether the tables' host memory is going to be pinned, if the system allows it."""
    return device.type == "cuda" and config.engine in ("auto", "zero_copy") and config.host_file is None


def open_transfers(
    config: OffloadConfig,
    host: HostTable,
    window_CW: Tensor,
    shard: Shard,
    driver_of: Callable[[torch.device], Driver] = CudaDriver,
) -> Transfers:
    """The engine that the config asks for, or, with `auto`, the one that proves faster here.

    Args:
        config: offload settings.
        host: the shard's records. Pinned here, for the engine that needs it.
        window_CW: the window's records, on the device. `auto` fetches into it.
        shard: the rows.
        driver_of: who pins memory for a GPU.

    Raises:
        ValueError: this device has no such engine, or host memory cannot be pinned.
    """
    device = window_CW.device
    engine = "cpu" if config.engine == "auto" and device.type == "cpu" else config.engine
    _require_possible(engine, config, device)
    streams = streams_of(device)
    if engine == "cpu":
        return CpuTransfers(host.records_RW, window_CW, shard, config.emulate_link)
    if engine == "zero_copy":
        return _zero_copy(config, host, window_CW, shard, streams, driver_of)
    staged = StagedTransfers(host.records_RW, window_CW, shard, streams, _staging_threads())
    if engine == "staged" or config.host_file is not None:
        return staged
    try:
        zero_copy = _zero_copy(config, host, window_CW, shard, streams, driver_of)
    except PinError as error:
        _log.warning("offload.engine: staged, since %s", error)
        return staged
    fastest = _faster(zero_copy, staged, len(host.records_RW), window_CW)
    if fastest is staged:
        host.unpin()
    return fastest


def _require_possible(engine: str, config: OffloadConfig, device: torch.device) -> None:
    if engine == "cpu" and device.type != "cpu":
        raise ValueError(
            f"offload.engine=cpu keeps the window in host memory, but the model is on {device}: set it to auto"
        )
    if engine != "cpu" and config.emulate_link is not None:
        raise ValueError(f"offload.emulate_link has no meaning on {device}: set it to null, or train on the CPU")


def _zero_copy(
    config: OffloadConfig,
    host: HostTable,
    window_CW: Tensor,
    shard: Shard,
    streams: Streams,
    driver_of: Callable[[torch.device], Driver],
) -> ZeroCopyTransfers:
    device = window_CW.device
    seen_RW = host.records_RW if device.type == "cpu" else host.pin(driver_of(device), device)
    programs = PROGRAMS if config.programs is None else config.programs
    return ZeroCopyTransfers(seen_RW, window_CW, shard, streams, programs)


def _staging_threads() -> int:
    """Cores for each direction's worker: a quarter of this rank's share."""
    return max(1, min(_MAX_STAGING_THREADS, cores() // local_ranks() // 4))


def _faster(one: Transfers, other: Transfers, num_rows: int, window_CW: Tensor) -> Transfers:
    """Times fetches from host memory into slots that are still free; ends the slower engine."""
    count = min(num_rows, len(window_CW), _SAMPLE_ROWS)
    slots = torch.arange(count)
    rows = slots * (num_rows // max(1, count))
    seconds = {engine: _fetch_s(engine, rows, slots) for engine in (one, other)}
    fastest, slowest = sorted(seconds, key=lambda engine: seconds[engine])
    nbytes = count * window_CW.shape[1] * window_CW.element_size()
    rates = ", ".join(f"{engine.name} {nbytes / 1e9 / s:.1f} GB/s" for engine, s in seconds.items())
    _log.info("offload.engine: %s (measured: %s)", fastest.name, rates)
    slowest.close()
    return fastest


def _fetch_s(engine: Transfers, rows: Tensor, slots: Tensor) -> float:
    """The shortest of a few fetches, after one that may have to compile."""
    engine.fetch(rows, slots, len(rows)).wait()
    times = []
    for _ in range(_SAMPLES):
        started = time.perf_counter()
        engine.fetch(rows, slots, len(rows)).wait()
        times.append(time.perf_counter() - started)
    return min(times)
