"""Opens the engine that carries records between host memory and the window: one of four.

`zero_copy`: kernels that reach into pinned host memory. `staged`: the CPU gathers, the GPU's copy engines carry.
`mixed`: the first in, the second out. `cpu`: the window is in host memory too. All give the same bits.
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.records import PROGRAMS
from offload.config import OffloadConfig
from offload.device.streams import Streams, streams_of
from offload.errors import Unavailable
from offload.host.cores import usable_cores
from offload.host.limits import local_ranks
from offload.host.pinned import CudaDriver, Driver, PinError
from offload.host.table import FileTable, HostTable
from offload.rows.shard import Shard
from offload.transfers.agreement import Ranks, fastest
from offload.transfers.cpu import CpuTransfers
from offload.transfers.engine import Transfers
from offload.transfers.loads import Launches, Products
from offload.transfers.mixed import MixedTransfers
from offload.transfers.staged import StagedTransfers
from offload.transfers.trial import Trial
from offload.transfers.zero_copy import ZeroCopyTransfers

_log = logging.getLogger(__name__)

_MAX_STAGING_THREADS = 8


def pins(config: OffloadConfig, device: torch.device) -> bool:
    """Whether the tables' host memory is going to be pinned, if the system allows it."""
    return device.type == "cuda" and (config.engine == "auto" or config.pins) and config.host_file is None


def open_transfers(
    config: OffloadConfig,
    host: HostTable | FileTable,
    window_CW: Tensor,
    shard: Shard,
    driver_of: Callable[[torch.device], Driver] = CudaDriver,
    *,
    group: dist.ProcessGroup | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Transfers:
    """The engine that the config asks for, or, with `auto`, the one least in the way: the same on all ranks.

    How many programs copy is measured too, unless the config says it. Collective.

    Args:
        config: offload settings.
        host: the shard's records. Pinned here, for the engine that needs it.
        window_CW: the window's records, on the device. Measuring fetches into it.
        shard: the rows.
        driver_of: who pins memory for a GPU.
        group: the shard's ranks, with communication in host memory; None for all.
        tell: is told what takes long, and what was measured.

    Raises:
        Unavailable: this device has no such engine, or host memory cannot be pinned.
    """
    device = window_CW.device
    engine = "cpu" if config.engine == "auto" and device.type == "cpu" else config.engine
    _require_possible(engine, config, device)
    streams = streams_of(device)
    if engine == "cpu":
        return CpuTransfers(host.records_RW, window_CW, shard, config.emulate_link)

    def open_staged() -> StagedTransfers:
        return StagedTransfers(host.records_RW, window_CW, shard, streams, _staging_threads())

    if engine == "staged" or config.host_file is not None or isinstance(host, FileTable):
        return open_staged()
    ranks = Ranks(shard.sharding.world_size, group)
    try:
        seen_RW = _seen(host, device, driver_of, ranks, tell)
    except PinError as error:
        if engine != "auto":
            raise
        _log.warning("offload.engine: staged, since %s", error)
        return open_staged()
    trial = Trial(len(seen_RW), window_CW)
    allowed = _programs(config, device)
    kernels = [ZeroCopyTransfers(seen_RW, window_CW, shard, streams, programs) for programs in allowed]
    zero_copy = _least_in_the_way(kernels, allowed, trial, streams, device, ranks, tell)
    if engine == "zero_copy":
        return zero_copy
    staged = open_staged()
    mixed = MixedTransfers(zero_copy, staged)
    if engine == "mixed":
        return mixed
    chosen = _measured([zero_copy, mixed, staged], trial, streams, device, ranks, tell)
    if chosen is zero_copy:
        staged.close()
    elif chosen is staged:
        zero_copy.close()
        host.unpin()
    return chosen


def _require_possible(engine: str, config: OffloadConfig, device: torch.device) -> None:
    if engine == "cpu" and device.type != "cpu":
        raise Unavailable(
            f"offload.engine=cpu keeps the window in host memory, but the model is on {device}: set it to auto"
        )
    if engine != "cpu" and config.emulate_link is not None:
        raise Unavailable(f"offload.emulate_link has no meaning on {device}: set it to null, or train on the CPU")


def _seen(
    host: HostTable,
    device: torch.device,
    driver_of: Callable[[torch.device], Driver],
    ranks: Ranks,
    tell: Callable[[str], None],
) -> Tensor:
    """The records as the device sees them, pinned for a GPU. Collective.

    Raises:
        PinError: on every rank, if this or another one cannot pin.
    """
    if device.type == "cpu":
        return host.records_RW
    if host.device_RW is not None:  # pinned for a window before this one
        return host.device_RW
    refused, seen_RW = None, host.records_RW
    try:
        seen_RW = host.pin(driver_of(device), device, tell)
    except PinError as error:
        refused = error
    if ranks.any(refused is not None):
        host.unpin()
        raise refused or PinError("another rank cannot pin its tables")
    return seen_RW


def _programs(config: OffloadConfig, device: torch.device) -> Sequence[int]:
    """What the config says, or all that is to be measured; nothing is on a CPU, where it makes no difference."""
    if config.programs is not None:
        return (config.programs,)
    return (PROGRAMS,) if device.type == "cpu" else (PROGRAMS, PROGRAMS // 2, 2 * PROGRAMS)


def _measured(
    engines: Sequence[Transfers],
    trial: Trial,
    streams: Streams,
    device: torch.device,
    ranks: Ranks,
    tell: Callable[[str], None],
) -> Transfers:
    """That beside which a GPU and the loop before it lose least time. Collective."""
    chosen, seconds = fastest(engines, trial, ranks, [Products(streams, device), Launches(streams, device)])
    rates = ", ".join(f"{each.name} {1e3 * s:.1f}" for each, s in zip(engines, seconds, strict=True))
    tell(f"offload.engine: {chosen.name} (measured beside products and launches, ms a GB each way: {rates})")
    return chosen


def _least_in_the_way(
    engines: Sequence[ZeroCopyTransfers],
    programs: Sequence[int],
    trial: Trial,
    streams: Streams,
    device: torch.device,
    ranks: Ranks,
    tell: Callable[[str], None],
) -> ZeroCopyTransfers:
    """That beside which matrix products end first; the others are closed. Collective."""
    if len(engines) == 1:
        return engines[0]
    chosen, seconds = fastest(engines, trial, ranks, [Products(streams, device)])
    for engine in engines:
        if engine is not chosen:
            engine.close()
    rates = ", ".join(f"{number} {1e3 * s:.1f}" for number, s in zip(programs, seconds, strict=True))
    tell(f"offload.programs: {programs[engines.index(chosen)]} (measured beside products, ms a GB each way: {rates})")
    return chosen


def _staging_threads() -> int:
    """Cores for each direction's worker: a quarter of this rank's share."""
    return max(1, min(_MAX_STAGING_THREADS, usable_cores() // local_ranks() // 4))
