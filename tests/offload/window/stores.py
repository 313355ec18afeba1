"""Windows over small shards, for tests."""

import torch

from offload.config import OffloadConfig
from offload.plan.sharding import Sharding
from offload.rows.records import RecordLayout, RowInit
from offload.window.store import WindowStore

DIM = 4
NUM_ROWS = 40


def open_window(config: OffloadConfig, *, beside: bool) -> WindowStore:
    """A window over NUM_ROWS rows of DIM columns, on the CPU."""
    layout = RecordLayout.of(DIM, config.optimizer, config.row_dtype)
    shard = Sharding((NUM_ROWS,), 1), 0, layout, RowInit(3, 0.02), torch.device("cpu")
    return WindowStore(config, *shard, beside=beside)
