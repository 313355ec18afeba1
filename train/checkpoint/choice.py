"""Which checkpoint a run continues from: what its nodes have of each, and whether that is all of it.

All ranks reach the same decision, from what their nodes report.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from train.checkpoint.checked import Damaged
from train.checkpoint.listing import checkpoints_in
from train.checkpoint.nodes import Nodes
from train.checkpoint.open import open_described, open_image, standing
from train.checkpoint.saved_image import Home, SavedImage
from train.checkpoint.together import SHARE, Failed, together
from train.errors import UserError


class Key(NamedTuple):
    """A checkpoint, whatever else is or was under its name: the name of its folder, and the checksum of its manifest,
    which holds the nonce of its save; empty where that cannot be read.
    """

    name: str
    checksum: str


@dataclass(frozen=True)
class Seen:
    """What one node sees of a checkpoint.

    Attributes:
        skipped: steps in a row right before it that were skipped.
        hosts: by rank, the node that keeps its part; empty if all is in one place.
        parts: all that it consists of; None where the full save that it adds to is missing.
        wrong: of those that are here, what is wrong.
        here: those that are here and have their sizes.
        fault: why it cannot be opened here.
    """

    key: Key
    skipped: int = 0
    hosts: tuple[str, ...] = ()
    parts: frozenset[Home] | None = None
    wrong: Mapping[Home, str] = field(default_factory=dict)
    here: frozenset[Home] = frozenset()
    fault: str = ""

    @classmethod
    def at(cls, path: Path, *, alone: bool) -> "Seen | None":
        """Looks at a folder: at manifests, indices and sizes; None if no checkpoint is there.

        Args:
            path: of the folder.
            alone: whether all ranks see it.
        """
        if not path.is_dir():
            return None
        try:
            image = open_image(path)
        except Damaged as error:
            return cls(Key(path.name, standing(path).checksum), fault=str(error))
        if not image.images:
            home = frozenset([Home(path.name, 0)])
            fault = "" if alone else "has a format that is read from a disk that all nodes share"
            return cls(Key(path.name, image.checksum), parts=home, here=home, fault=fault)
        manifest, homes, wrong, here = image.manifest, set[Home](), dict[Home, str](), set[Home]()
        for part in image.images:
            name = part.path.name
            faults = part.wrong_files()
            wrong |= {Home(name, rank): fault for rank, fault in faults.items()}
            homes |= {Home(name, rank) for rank in range(part.manifest.world_size)}
            here |= {Home(name, rank) for rank in part.here - faults.keys()}
        key = Key(path.name, image.checksum)
        parts, hosts = frozenset(homes), tuple(manifest.nodes)
        return cls(key, manifest.skipped_in_a_row, hosts, parts, wrong, frozenset(here))


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as all nodes together see it: by leader, what each node that has something of it sees."""

    seen: Mapping[int, Seen]

    @property
    def _some(self) -> Seen:
        opened = [seen for seen in self.seen.values() if not seen.fault]
        return (opened or [*self.seen.values()])[0]

    @property
    def key(self) -> Key:
        """Which one it is."""
        return self._some.key

    @property
    def skipped(self) -> int:
        """Steps in a row right before it that were skipped."""
        return self._some.skipped

    def why_not(self) -> str | None:
        """Why it is not intact, in a line; None if it is."""
        some = self._some
        if some.parts is None or some.fault:
            return some.fault
        missing = sorted(some.parts.difference(*(seen.here for seen in self.seen.values())))
        if not missing:
            return None
        for seen in self.seen.values():
            if seen.fault:
                return seen.fault
            if faults := [seen.wrong[home] for home in missing if home in seen.wrong]:
                return faults[0]
        folder = missing[0].folder
        ranks = [home.rank for home in missing if home.folder == folder]
        hosts = sorted({some.hosts[rank] for rank in ranks if rank < len(some.hosts)})
        of = "" if folder == some.key.name else f" of {folder}, the full save that it adds to,"
        return (
            f"the parts{of} that {_named('rank', ranks)} saved on {_named('node', hosts)} are on no node of this job: "
            "start it on nodes of which one has them"
        )

    def readers(self, nodes: Nodes) -> dict[Home, list[int]]:
        """The ranks that can read each part."""
        found: dict[Home, list[int]] = {}
        for leader, seen in self.seen.items():
            for home in seen.here:
                found.setdefault(home, []).extend(nodes.beside(leader))
        return found


def candidates(folder: Path, nodes: Nodes) -> Iterator[Candidate]:
    """The checkpoints of a run, newest first, each examined when it is requested. Collective, whatever is requested."""
    named = nodes.on_leaders(lambda: [found.path.name for found in checkpoints_in(folder)])
    for name in sorted({name for names in named.values() for name in names}, key=_step, reverse=True):
        yield from look(folder / name, nodes)


def look(path: Path, nodes: Nodes) -> list[Candidate]:
    """What is under one checkpoint's name, which is another one on nodes that missed a save. Collective."""
    seen = nodes.on_leaders(lambda: Seen.at(path, alone=not nodes.several))
    by_key: dict[Key, dict[int, Seen]] = {}
    for leader, found in seen.items():
        if found is not None:
            by_key.setdefault(found.key, {})[leader] = found
    return [Candidate(of_key) for of_key in by_key.values()]


def open_everywhere(path: Path, candidate: Candidate, nodes: Nodes) -> SavedImage:
    """The checkpoint on every rank, whether or not its node has a part of it. Collective.

    Raises:
        UserError: on all ranks, if ranks that should share a disk see different files.
    """
    if nodes.several:
        return _told_by(path, min(leader for leader, seen in candidate.seen.items() if not seen.fault), nodes)
    opened: list[SavedImage] = []

    def open_here() -> None:
        opened.append(open_image(path))
        if opened[0].checksum != candidate.key.checksum:
            raise Damaged(f"{path} is that of another save")

    try:
        together(open_here)
    except Failed as error:
        raise UserError(f"{path}: {error}, while rank 0 can read it: {SHARE}") from None
    return opened[0]


def _told_by(path: Path, leader: int, nodes: Nodes) -> SavedImage:
    """A checkpoint by the manifests and indices that one node has."""
    texts: dict[tuple[str, str], bytes] = {}

    def name(file: Path) -> tuple[str, str]:
        return file.relative_to(path.parent).parts[0], file.name

    def record(file: Path) -> bytes:
        return texts.setdefault(name(file), file.read_bytes())

    together(lambda: open_described(path, record).checksum if dist.get_rank() == leader else None, nodes.group)
    texts = nodes.from_rank(leader, texts)
    return open_described(path, lambda file: texts[name(file)])


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _named(what: str, items: list[int] | list[str]) -> str:
    return f"{what}{'s' if len(items) > 1 else ''} {', '.join(map(str, items))}"
