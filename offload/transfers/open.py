"""Opens the engine that carries records between host memory and the window: one of four.

`zero_copy`: kernels that reach into pinned host memory. `staged`: the CPU gathers, the GPU's copy engines carry.
`mixed`: the first in, the second out. `cpu`: the window is in host memory too. All give the same bits.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from kernels.records import PROGRAMS
from offload.config import OffloadConfig
from offload.device.streams import Event, streams_of
from offload.errors import Unavailable
from offload.host.cores import usable_cores
from offload.host.file_records import FileRecords
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

T = TypeVar("T", bound=Transfers)

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
    ranks: Ranks,
    driver_of: Callable[[torch.device], Driver] = CudaDriver,
    *,
    tell: Callable[[str], None] = lambda text: None,
) -> Transfers:
    """The engine that the config asks for, or, with `auto`, the one least in the way: the same on all ranks.

    How many programs copy is measured too, unless the config says it. Collective.

    Args:
        config: offload settings.
        host: the shard's records. Pinned here, for the engine that needs it.
        window_CW: the window's records, on the device. Measuring fetches into it.
        shard: the rows.
        ranks: the shard's.
        driver_of: who pins memory for a GPU.
        tell: is told what takes long, and what was measured.

    Raises:
        Unavailable: this device has no such engine, or host memory cannot be pinned.
    """
    device = window_CW.device
    engine = "cpu" if config.engine == "auto" and device.type == "cpu" else config.engine
    _require_possible(engine, config, device)
    if engine == "cpu":
        return CpuTransfers(host.records_RW, window_CW, shard, config.emulate_link)
    engines = _Engines(host.records_RW, window_CW, shard, ranks, tell)
    if engine == "staged" or config.host_file is not None or isinstance(host, FileTable):
        return engines.staged()
    try:
        seen_RW = engines.seen(host, driver_of)
    except PinError as error:
        if engine != "auto":
            raise
        _log.warning("offload.engine: staged, since %s", error)
        return engines.staged()
    zero_copy = engines.zero_copy(seen_RW, _programs(config, device))
    if engine == "zero_copy":
        return zero_copy
    staged = engines.staged()
    mixed = MixedTransfers(zero_copy, staged)
    if engine == "mixed":
        return mixed
    chosen = engines.least_in_the_way(zero_copy, mixed, staged)
    if chosen is zero_copy:
        staged.close()
    elif chosen is staged:
        zero_copy.close()
        host.unpin()
    return chosen


class _Engines:
    """Opens engines for a window, and compares them."""

    def __init__(
        self,
        host_RW: Tensor | FileRecords,
        window_CW: Tensor,
        shard: Shard,
        ranks: Ranks,
        tell: Callable[[str], None],
    ) -> None:
        self._host_RW, self._window_CW, self._shard, self._ranks, self._tell = host_RW, window_CW, shard, ranks, tell
        self._device, self._streams = window_CW.device, streams_of(window_CW.device)

    def staged(self) -> StagedTransfers:
        """The engine, with a quarter of this rank's share of cores for each direction."""
        threads = max(1, min(_MAX_STAGING_THREADS, usable_cores() // local_ranks() // 4))
        return StagedTransfers(self._host_RW, self._window_CW, self._shard, self._streams, threads)

    def seen(self, host: HostTable, driver_of: Callable[[torch.device], Driver]) -> Tensor:
        """The records as the device sees them, pinned for a GPU. Collective.

        Raises:
            PinError: on every rank, if this or another one cannot pin.
        """
        if self._device.type == "cpu":
            return host.records_RW
        if host.device_RW is not None:  # pinned for a window before this one
            return host.device_RW
        try:
            return self._ranks.agreed(
                lambda: host.pin(driver_of(self._device), self._device, self._tell),
                PinError("another rank cannot pin its tables"),
            )
        except PinError:
            host.unpin()
            raise

    def zero_copy(self, seen_RW: Tensor, programs: Sequence[int]) -> ZeroCopyTransfers:
        """That beside which matrix products end first; the others are closed. Collective."""
        engines = [
            ZeroCopyTransfers(seen_RW, self._window_CW, self._shard, self._streams, number) for number in programs
        ]
        if len(engines) == 1:
            return engines[0]
        chosen, rates = self._fastest(engines, programs, [self._products])
        for engine in engines:
            if engine is not chosen:
                engine.close()
        number = programs[engines.index(chosen)]
        self._tell(f"offload.programs: {number} (measured beside products, ms a GB each way: {rates})")
        return chosen

    def least_in_the_way(self, *engines: Transfers) -> Transfers:
        """That beside which a GPU and the loop before it lose least time. Collective."""
        loads: list[Callable[[], Event]] = [self._products, Launches(self._streams, self._device)]
        chosen, rates = self._fastest(engines, [engine.name for engine in engines], loads)
        self._tell(f"offload.engine: {chosen.name} (measured beside products and launches, ms a GB each way: {rates})")
        return chosen

    @cached_property
    def _products(self) -> Callable[[], Event]:
        return Products(self._streams, self._device)

    def _fastest(
        self, engines: Sequence[T], names: Sequence[object], loads: Sequence[Callable[[], Event]]
    ) -> tuple[T, str]:
        trial = Trial(len(self._host_RW), self._window_CW)
        chosen, seconds = fastest(engines, trial, self._ranks, loads)
        return chosen, ", ".join(f"{name} {1e3 * s:.1f}" for name, s in zip(names, seconds, strict=True))


def _require_possible(engine: str, config: OffloadConfig, device: torch.device) -> None:
    if engine == "cpu" and device.type != "cpu":
        raise Unavailable(
            f"offload.engine=cpu keeps the window in host memory, but the model is on {device}: set it to auto"
        )
    if engine != "cpu" and config.emulate_link is not None:
        raise Unavailable(f"offload.emulate_link has no meaning on {device}: set it to null, or train on the CPU")


def _programs(config: OffloadConfig, device: torch.device) -> Sequence[int]:
    """What the config says, or all that is to be measured; nothing is on a CPU, where it makes no difference."""
    if config.programs is not None:
        return (config.programs,)
    return (PROGRAMS,) if device.type == "cpu" else (PROGRAMS, PROGRAMS // 2, 2 * PROGRAMS)
