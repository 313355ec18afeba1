"""The tables of a checkpoint, read row by row: what is looked up is read from the files, and nothing else.

Shape suffixes: B batch, T sequence, S slots a token, N lookups, U unique rows, D columns of a row, W words of a record.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.gather import row_index
from model.engram import MemoryRows
from offload.addresses.hashing import AddressBook
from offload.rows.records import RecordLayout, RowInit, torch_dtype
from offload.rows.updater import RowUpdater
from train.checkpoint.files import Damaged
from train.config.job import JobConfig


class SavedTables:
    """All tables of a checkpoint, whatever number of ranks wrote it.

    Rows have the values that training's next forward would read: skipped optimizer steps are made up for, rows that
    were never updated are drawn, and the rounding of `offload.exchange_dtype` is applied.

    Args:
        checkpoint: its folder.
        state: what the checkpoint says of itself.
        job: the run's config.
        addresses: from tokens to rows.

    Raises:
        Damaged: a file cannot be read.
        ValueError: the rows were trained with other settings than the config's.
    """

    def __init__(self, checkpoint: Path, state: dict[str, Any], job: JobConfig, addresses: AddressBook) -> None:
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
        self._updater.load_state(state["tables"])
        self._dtype = torch_dtype(job.offload.exchange_dtype)
        self._files = [_RowFile(checkpoint / name) for name in state["table_files"]]

    @property
    def record_bytes(self) -> int:
        """Bytes that reading one row takes."""
        return self._layout.bytes + self._layout.unpacked.bytes

    def rows(self, module: int, rows_U: Tensor) -> Tensor:
        """Values fp32 [U, D] of rows of one module's table (int64 [U], ascending and unique)."""
        ids_U = rows_U + sum(self.num_rows[:module])
        records_UW = torch.zeros(len(ids_U), self._layout.words)
        for file in self._files:
            file.read(ids_U, records_UW)
        self._init.fill(self._layout, records_UW, ids_U)
        records_UX = self._layout.unpack(records_UW)
        self._updater.catch_up(records_UX)
        self.rows_read += len(ids_U)
        return self._layout.unpacked.weights(records_UX).to(self._dtype).float().contiguous()

    def look_up(
        self, tokens_BT: Tensor, positions_BT: Tensor, device: torch.device | str = "cpu", *, skip: int = 0
    ) -> list[MemoryRows]:
        """What the model reads for a batch, an entry for each Engram layer.

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


@dataclass(frozen=True)
class _Chunk:
    """Some rows of a file, with consecutive ones of its ascending ids."""

    number: str
    first: int
    last: int


class _RowFile:
    """The rows that one rank owned and had ever updated. Memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt")
            self._chunks = list(self._list_chunks())
        except FileNotFoundError:
            raise Damaged(f"{path.name} is missing") from None
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path.name} cannot be read ({error})") from None

    def read(self, ids_U: Tensor, out_UW: Tensor) -> None:
        """Puts the records of those of the ascending ids that are here into their places."""
        for chunk in self._chunks:
            start, end = torch.searchsorted(ids_U, torch.tensor([chunk.first, chunk.last + 1])).tolist()
            if start == end:
                continue
            wanted = ids_U[start:end]
            held = self._file.get_tensor(f"ids.{chunk.number}")
            places = torch.searchsorted(held, wanted)
            here = held[places] == wanted
            records = self._file.get_tensor(f"records.{chunk.number}")
            out_UW[start:end][here] = records[places[here]]

    def _list_chunks(self) -> Iterator[_Chunk]:
        keys: Sequence[str] = self._file.keys()
        for number in sorted(key.removeprefix("ids.") for key in keys if key.startswith("ids.")):
            ids = self._file.get_tensor(f"ids.{number}")
            yield _Chunk(number, int(ids[0]), int(ids[-1]))
