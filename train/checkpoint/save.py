"""One save: all ranks write their parts side by side, and rank 0 makes a checkpoint of them.

    begin    rank 0 makes a folder under a hidden name; every rank must see it
    write    each rank its own pieces, in bounded memory, and waits until they are on the disk; no communication
    publish  once all ranks are done: rank 0 looks that all parts are there, writes the manifest, renames the folder

What ends before the rename leaves no checkpoint, and whatever there was before stays as it is.
"""

import platform
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch.distributed as dist
from torch import Tensor

from train.checkpoint.index import Index, Save, Written
from train.checkpoint.listing import remove_unfinished
from train.checkpoint.manifest import MANIFEST_FILE
from train.checkpoint.part_reader import PartReader
from train.checkpoint.parts import PartWriter, write_synced
from train.checkpoint.together import SHARE, Failed, on_rank_0, together
from train.errors import UserError
from train.files import put_in_place, sync
from train.optim.pieces import StatePiece


@dataclass(frozen=True)
class Saving:
    """A save under way.

    Attributes:
        target: the folder that it will be.
        partial: the folder that it is until then.
        save: of this rank.
        group: of all ranks, that they agree over.
    """

    target: Path
    partial: Path
    save: Save
    group: dist.ProcessGroup | None

    @classmethod
    def begin(cls, target: Path, step: int, group: dist.ProcessGroup | None = None) -> Self:
        """Makes the folder, and removes what earlier saves left that were cut off. Collective.

        Raises:
            Failed: on all ranks, if rank 0 cannot make it or another rank does not see it.
        """
        nonce = on_rank_0(lambda: _make_folder(target), group)
        partial = target.with_name(_partial_name(target, nonce))
        saving = cls(target, partial, Save(step, nonce, dist.get_rank(), dist.get_world_size()), group)
        with saving._or_nothing():
            together(lambda: saving._require(partial), group)
        return saving

    def write(self, pieces: Iterable[StatePiece], rows: Iterable[tuple[Tensor, Tensor]]) -> list[Written]:
        """Writes this rank's part; returns what all ranks have written, all of it on the disk. Collective.

        Args:
            pieces: of the backbone.
            rows: of the tables: ids and records.

        Raises:
            Failed: on all ranks, if the disk of one is full or cannot be written. What was written is removed.
        """
        with self._or_nothing():
            return together(lambda: self._write(pieces, rows), self.group)

    def publish(self, written: Sequence[Written], manifest: Callable[[], bytes]) -> None:
        """Makes a checkpoint of what all ranks have written, under the manifest that rank 0 has. Collective.

        Raises:
            Failed: on all ranks, if a part is not there, the disk cannot be written, or a rank does not see the result.
        """
        with self._or_nothing():
            on_rank_0(lambda: self._publish(written, manifest()), self.group)
            together(lambda: self._require(self.target / MANIFEST_FILE), self.group)

    def _write(self, pieces: Iterable[StatePiece], rows: Iterable[tuple[Tensor, Tensor]]) -> Written:
        with PartWriter(self.partial, self.save) as writer:
            for piece in pieces:
                writer.add(*piece)
            for ids, records in rows:
                writer.add_rows(ids, records)
            return writer.finish()

    def _publish(self, written: Sequence[Written], manifest: bytes) -> None:
        PartReader(self.partial, [Index.read(self.partial / of_rank.index)[0] for of_rank in written]).check_sizes()
        write_synced(self.partial / MANIFEST_FILE, [manifest])
        sync(self.partial)
        put_in_place(self.partial, self.target, overwrite=True)

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except Failed:
            # All ranks are here: nobody writes any more.
            shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _require(self, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"rank {self.save.rank} on {platform.node()} does not see {path}, which rank 0 has made: {SHARE}"
            )


def _make_folder(target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(target.parent)
    nonce = secrets.token_hex(8)
    target.with_name(_partial_name(target, nonce)).mkdir()
    return nonce


def _partial_name(target: Path, nonce: str) -> str:
    return f".{target.name}.{nonce}.partial"
