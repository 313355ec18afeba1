"""Opens the engine that carries records between host memory and the window: one of three.

`zero_copy`: kernels that reach into pinned host memory. `staged`: the CPU gathers, the GPU's copy engines carry.
`cpu`: the window is in host memory too. All give the same bits.
"""

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.records import PROGRAMS
from offload.config import OffloadConfig
from offload.device.streams import Streams, streams_of
from offload.host.limits import local_ranks
from offload.host.memory import cores
from offload.host.pinned import CudaDriver, Driver, PinError
from offload.host.table import HostTable
from offload.rows.shard import Shard
from offload.transfers.agreement import Ranks, fastest
from offload.transfers.cpu import CpuTransfers
from offload.transfers.engine import Transfers
from offload.transfers.staged import StagedTransfers
from offload.transfers.zero_copy import ZeroCopyTransfers

_log = logging.getLogger(__name__)

_MAX_STAGING_THREADS = 8


def pins(config: OffloadConfig, device: torch.device) -> bool:
    """Whether the tables' host memory is going to be pinned, if the system allows it."""
    return device.type == "cuda" and config.engine in ("auto", "zero_copy") and config.host_file is None


def open_transfers(
    config: OffloadConfig,
    host: HostTable,
    window_CW: Tensor,
    shard: Shard,
    driver_of: Callable[[torch.device], Driver] = CudaDriver,
    *,
    group: dist.ProcessGroup | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Transfers:
    """The engine that the config asks for, or, with `auto`, the faster one: the same on all ranks. Collective.

    Args:
        config: offload settings.
        host: the shard's records. Pinned here, for the engine that needs it.
        window_CW: the window's records, on the device. `auto` fetches into it.
        shard: the rows.
        driver_of: who pins memory for a GPU.
        group: the shard's ranks, with communication in host memory; None for all.
        tell: is told what takes long, and what `auto` came to.

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
        return _zero_copy(config, host, window_CW, shard, streams, driver_of, tell)
    staged = StagedTransfers(host.records_RW, window_CW, shard, streams, _staging_threads())
    if engine == "staged" or config.host_file is not None:
        return staged
    ranks, refused = Ranks(shard.sharding.world_size, group), None
    try:
        zero_copy = _zero_copy(config, host, window_CW, shard, streams, driver_of, tell)
    except PinError as error:
        refused = error
    if ranks.any(refused is not None):
        _log.warning("offload.engine: staged, since %s", refused or "another rank cannot pin its tables")
        chosen: Transfers = staged
    else:
        chosen, rates = fastest([zero_copy, staged], len(host.records_RW), window_CW, ranks)
        tell(f"offload.engine: {chosen.name} (measured: {rates})")
    if chosen is not staged:
        staged.close()
    elif refused is None:
        zero_copy.close()
        host.unpin()
    return chosen


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
    tell: Callable[[str], None],
) -> ZeroCopyTransfers:
    device = window_CW.device
    seen_RW = host.records_RW if device.type == "cpu" else host.device_RW
    if seen_RW is None:  # not pinned for a window before this one
        seen_RW = host.pin(driver_of(device), device, tell)
    programs = PROGRAMS if config.programs is None else config.programs
    return ZeroCopyTransfers(seen_RW, window_CW, shard, streams, programs)


def _staging_threads() -> int:
    """Cores for each direction's worker: a quarter of this rank's share."""
    return max(1, min(_MAX_STAGING_THREADS, cores() // local_ranks() // 4))
