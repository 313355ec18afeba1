"""The tables of a checkpoint, read row by row: what is looked up is read from the files, and nothing else.

Shape suffixes: B batch, T sequence, S sub-tables, N lookups, U unique rows, D columns of a row, W words of a record.
"""

import torch
from torch import Tensor

from kernels.gather import row_index
from model.engram import MemoryRows
from offload.addresses.hashing import AddressBook
from offload.rows.records import RecordLayout, RowInit, torch_dtype
from offload.rows.updater import RowUpdater
from train.checkpoint.checked import Damaged
from train.checkpoint.saved_image import SavedImage, find_counts, find_rows
from train.config.job import JobConfig
from train.errors import UserError


class SavedTables:
    """All tables of a checkpoint, whatever number of ranks wrote it.

    Rows have the values that training's next forward would read: skipped optimizer steps are made up for, rows that
    were never updated are drawn, and the rounding of `offload.exchange_dtype` is applied.

    Args:
        image: the checkpoint.
        job: the run's config.
        addresses: from tokens to rows.

    Raises:
        ValueError: the rows were trained with other settings than the config's.
    """

    def __init__(self, image: SavedImage, job: JobConfig, addresses: AddressBook) -> None:
        assert job.model.engram is not None
        self.addresses, self.num_rows = addresses, [addresses.num_rows(m) for m in range(addresses.num_modules)]
        self.dim = job.model.engram.row_dim
        self.longest_order = max(job.model.engram.orders)
        """Tokens of the longest n-gram."""
        self.rows_read = 0
        """Rows read since the tables were opened."""
        self._layout = RecordLayout.of(self.dim, job.offload.optimizer, job.offload.row_dtype)
        self._init = RowInit(job.train.seed, job.model.engram.init_std)
        self._updater = RowUpdater(job.offload.optimizer, self._layout, seed=job.train.seed)
        self._updater.load_state(image.manifest.tables or {})
        self._dtype = torch_dtype(job.offload.exchange_dtype)
        self._image = image

    @property
    def record_bytes(self) -> int:
        """Bytes that reading one row takes."""
        return self._layout.bytes + self._layout.unpacked.bytes

    def update_counts(self, module: int, rows_U: Tensor) -> Tensor:
        """How often rows of one module's table were updated, int64 [U]: 255 for more, -1 where that was not saved.

        Args:
            module: number of the Engram module.
            rows_U: int64 [U], ascending and unique.
        """
        return find_counts(self._image, rows_U + sum(self.num_rows[:module]))

    def rows(self, module: int, rows_U: Tensor) -> Tensor:
        """Values fp32 [U, D] of rows of one module's table (int64 [U], ascending and unique).

        Raises:
            UserError: one of them is not what was saved.
        """
        ids_U = rows_U + sum(self.num_rows[:module])
        records_UW = torch.zeros(len(ids_U), self._layout.words)
        try:
            find_rows(self._image, ids_U, records_UW)
        except Damaged as error:
            raise UserError(f"{self._image.path}: {error}; take another with --step") from None
        self._init.fill(self._layout, records_UW, ids_U)
        records_UX = self._layout.unpack(records_UW)
        self._updater.catch_up(records_UX)
        self.rows_read += len(ids_U)
        return self._layout.unpacked.weights(records_UX).to(self._dtype).float().contiguous()

    def look_up(
        self, tokens_BT: Tensor, positions_BT: Tensor, device: torch.device | str = "cpu", *, skip: int = 0
    ) -> list[MemoryRows]:
        """What the model reads for a batch, one entry for each Engram layer.

        Args:
            tokens_BT: int64, on the CPU.
            positions_BT: int64 positions within documents.
            device: of the result.
            skip: leading tokens that are there only for n-grams to look back to; their own rows are not read.
        """
        looked_up = []
        for module, rows_BTS in enumerate(self.addresses.all_rows(tokens_BT, positions_BT)[:, :, skip:]):
            unique_U, index_N = rows_BTS.flatten().unique(return_inverse=True)
            index = row_index(index_N, len(unique_U))
            looked_up.append(MemoryRows(self.rows(module, unique_U).to(device), index.to(device)))
        return looked_up
