"""Which ranks see one folder. Where no disk is shared, each node keeps what its own ranks write of a checkpoint.

All ranks of a job on a shared disk are one node, in the words of this file.
"""

import platform
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import torch.distributed as dist

from train.checkpoint.together import on_rank_0, together
from train.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job. All ranks call the same methods in the same order.

    Attributes:
        leaders: by rank, the lowest of those that see the same folder.
        hosts: by rank, the name of its host; empty if all ranks share a disk.
        group: of all ranks, with communication in host memory.
    """

    leaders: tuple[int, ...]
    hosts: tuple[str, ...]
    group: dist.ProcessGroup

    @classmethod
    def one(cls, group: dist.ProcessGroup) -> Self:
        """All ranks are taken to share a disk; the first save finds whether they do."""
        return cls((0,) * dist.get_world_size(), (), group)

    @classmethod
    def found(cls, folder: Path, group: dist.ProcessGroup) -> Self:
        """Finds out which ranks see each other's files in a folder, which it makes.

        Raises:
            UserError: on all ranks, if a folder cannot be written, or some ranks see files of others that do not see
                theirs.
        """
        nonce = on_rank_0(lambda: secrets.token_hex(8), group)
        mark = folder / f".node-{nonce}-{dist.get_rank()}"
        try:
            together(lambda: _touch(mark), group)
            seen = together(lambda: sorted(int(p.name.split("-")[-1]) for p in folder.glob(f".node-{nonce}-*")), group)
        finally:
            with suppress(OSError):
                mark.unlink()
        if any(seen[rank] != ranks for ranks in seen for rank in ranks):
            raise UserError(f"{folder}: some ranks see files of others that do not see theirs; choose another run.dir")
        return cls(tuple(ranks[0] for ranks in seen), tuple(together(platform.node, group)), group)

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return any(self.leaders)

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that acts for its node."""
        return self.leaders[dist.get_rank()] == dist.get_rank()

    def beside(self, rank: int) -> list[int]:
        """The ranks of the node that a rank is on."""
        return [other for other, leader in enumerate(self.leaders) if leader == self.leaders[rank]]

    def on_leaders(self, action: Callable[[], T]) -> dict[int, T]:
        """Runs `action` once on each node; returns what it returned, by leader. Collective.

        Raises:
            Failed: on all ranks, if it raised OSError, Damaged or UserError on one of them.
        """
        found = together(lambda: action() if self.leads else None, self.group)
        return {leader: found[leader] for leader in sorted({*self.leaders})}  # type: ignore[misc]

    def from_rank(self, source: int, value: T | None) -> T:
        """What rank `source` has, on all ranks; `value` of the others does not count. Collective."""
        values = [value]
        if self.several:
            dist.broadcast_object_list(values, source, self.group)
        return values[0]  # type: ignore[return-value]


def _touch(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
