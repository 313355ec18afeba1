"""One save: all ranks write their parts side by side, and rank 0 makes a checkpoint of them.

    begin    rank 0 makes a folder under a hidden name; every rank must see it
    write    each rank its own pieces, in bounded memory, and waits until they are on the disk; no communication
    publish  once all ranks are done: rank 0 checks that all parts are there, writes the manifest, renames the folder

A save that ends before the rename leaves no checkpoint, and whatever there was before stays as it is. Where each node
keeps its own parts, one rank of each does what rank 0 does, with one manifest and copies of all indices. One that ends
between the renames of two nodes has its name on only some of them, and is not a checkpoint either.
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

from train.checkpoint.checked import Damaged
from train.checkpoint.index import ELSEWHERE, Index, Save, Written
from train.checkpoint.listing import remove_unfinished
from train.checkpoint.manifest import MANIFEST_FILE
from train.checkpoint.nodes import Nodes
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
        nodes: of the job; their ranks agree over its group.
    """

    target: Path
    partial: Path
    save: Save
    nodes: Nodes

    @classmethod
    def begin(cls, target: Path, step: int, nodes: Nodes) -> Self:
        """Makes the folder, and removes what interrupted saves left behind. Collective.

        Raises:
            Failed: on all ranks, if rank 0 cannot make it or another rank does not see it.
        """
        nonce = on_rank_0(lambda: secrets.token_hex(8), nodes.group)
        partial = target.with_name(_partial_name(target, nonce))
        saving = cls(target, partial, Save(step, nonce, dist.get_rank(), dist.get_world_size()), nodes)
        with saving._or_nothing():
            nodes.on_leaders(lambda: _make_folder(partial))
            together(lambda: saving._require(partial), nodes.group)
        return saving

    def write(self, pieces: Iterable[StatePiece], rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[Written]:
        """Writes this rank's part; returns what all ranks have written, all of it on the disk. Collective.

        Args:
            pieces: of the backbone.
            rows: of the tables: ids, records and update counts.

        Raises:
            Failed: on all ranks, if the disk of one is full or cannot be written. What was written is removed.
        """
        with self._or_nothing():
            return together(lambda: self._write(pieces, rows), self.nodes.group)

    def publish(self, written: Sequence[Written], manifest: Callable[[], bytes]) -> None:
        """Makes a checkpoint of what all ranks have written, under the manifest that rank 0 has. Collective.

        Raises:
            Failed: on all ranks, if a part is not there, the disk cannot be written, or a rank does not see the result.
        """
        with self._or_nothing():
            text = self.nodes.from_rank(0, manifest() if self.save.rank == 0 else None)
            if self.nodes.several:
                self._copy_indices(written)
            # Once one has its name, no other may still fail for want of room.
            self.nodes.on_leaders(lambda: self._complete(written, text))
            self.nodes.on_leaders(lambda: put_in_place(self.partial, self.target, overwrite=True))
            together(lambda: self._require(self.target / MANIFEST_FILE), self.nodes.group)

    def _write(self, pieces: Iterable[StatePiece], rows: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Written:
        with PartWriter(self.partial, self.save) as writer:
            for piece in pieces:
                writer.add(*piece)
            for of_piece in rows:
                writer.add_rows(*of_piece)
            return writer.finish()

    def _copy_indices(self, written: Sequence[Written]) -> None:
        """Each node gets the indices of the others' parts, one after another."""
        faults: list[OSError] = []
        for rank, of_rank in enumerate(written):
            text = None
            try:
                if rank == self.save.rank:
                    text = (self.partial / of_rank.index).read_bytes()
            except OSError as error:
                faults.append(error)
            text = self.nodes.from_rank(rank, text)
            if self.nodes.leads and self.nodes.leaders[rank] != self.save.rank and not faults:
                try:
                    (self.partial / ELSEWHERE).mkdir(exist_ok=True)
                    write_synced(self.partial / ELSEWHERE / of_rank.index, [text or b""])
                except OSError as error:
                    faults.append(error)
        together(lambda: _raise_first(faults), self.nodes.group)

    def _complete(self, written: Sequence[Written], manifest: bytes) -> None:
        """Adds the manifest to this node's parts, once all of these are there."""
        ranks = self.nodes.beside(self.save.rank)
        indices = [Index.read(self.partial / written[rank].index)[0] for rank in ranks]
        for fault in PartReader(self.partial, indices).wrong_sizes(ranks).values():
            raise Damaged(fault)
        write_synced(self.partial / MANIFEST_FILE, [manifest])
        if self.nodes.several:
            sync(self.partial / ELSEWHERE)
        sync(self.partial)

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
                f"rank {self.save.rank} on {platform.node()} does not see {path}, which rank "
                f"{self.nodes.leaders[self.save.rank]} has made: {SHARE}"
            )


def _make_folder(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(partial.parent)
    partial.mkdir()


def _raise_first(errors: Sequence[OSError]) -> None:
    for error in errors:
        raise error


def _partial_name(target: Path, nonce: str) -> str:
    return f".{target.name}.{nonce}.partial"
