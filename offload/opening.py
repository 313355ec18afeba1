"""Opens a rank's shard: where its records are, and who updates and watches them."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from offload.addresses.hashing import AddressBook
from offload.config import OffloadConfig
from offload.device.sender import Sender
from offload.observer import Observer
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit, torch_dtype
from offload.rows.updater import RowUpdater
from offload.step import RankShard
from offload.verify.verifier import Verifier
from offload.window.resident import ResidentStore
from offload.window.store import WindowStore

_DECIDING_BESIDE = ("cuda",)
"""Devices beside whose loop a thread decides on coming steps: a CPU's cores have enough to do."""


def open_shard(
    config: OffloadConfig,
    addresses: AddressBook,
    dim: int,
    init: RowInit,
    *,
    group: dist.ProcessGroup | None,
    host_group: dist.ProcessGroup | None,
    device: torch.device,
    tell: Callable[[str], None],
) -> RankShard:
    """This rank's shard, with no row updated. Arguments and errors of `EngramTables`."""
    world_size = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if dist.is_initialized() else 0
    sharding = Sharding(tuple(addresses.num_rows(m) for m in range(addresses.num_modules)), world_size)
    layout = RecordLayout.of(dim, config.optimizer, config.row_dtype)
    of_shard = sharding, rank, layout, init, device
    beside = device.type in _DECIDING_BESIDE
    shard = RankShard(
        ResidentStore(*of_shard)
        if config.mode == "resident"
        else WindowStore(config, *of_shard, beside=beside, group=host_group, tell=tell),
        Sender(device),
        RowUpdater(config.optimizer, layout, seed=init.seed, device=device),
        layout,
        sharding,
        rank,
        group,
        device,
        torch_dtype(config.exchange_dtype),
        Observer(),
    )
    return replace(shard, observer=Verifier(shard, addresses, init)) if config.verify else shard
