"""Where a job's data are, to be checked before what takes seconds to import."""

from dataclasses import dataclass
from pathlib import Path

from train.data.stores.manifest import MANIFEST
from train.errors import UserError

SHARDS = "shards"
"""Folder in `data.cache` of what belongs to stores by URL."""


@dataclass(frozen=True)
class Elsewhere:
    """How stores by URL are read.

    Attributes:
        folder: of the cache.
        limit: the most bytes in it.
        patience_s: for which a server may fail.
    """

    folder: Path = Path("data", SHARDS)
    limit: int = 50_000_000_000
    patience_s: float = 600.0


def located(path: str | Path) -> Path:
    """The prepared folder that `path` is, or the prefix of the Megatron pair that it, or one of its files, names.

    Raises:
        UserError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            hint = f"prepare it first: engram data prepare {path} --out DIR"
            raise UserError(f"{path}: not a prepared token store (no {MANIFEST}); if it holds text, {hint}")
        return path
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not prefix.with_name(prefix.name + ".idx").is_file():
        home = "; ~ is not your home here: write the folder out" if path.parts[:1] == ("~",) else ""
        raise UserError(f"{path}: no prepared folder and no .bin/.idx pair there{home}; make one: engram data prepare")
    return prefix
