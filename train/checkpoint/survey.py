"""What checkpoints a run has, whether they are intact, and which may go."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from train.checkpoint.checked import Damaged
from train.checkpoint.listing import (
    CHECKPOINTS,
    Found,
    checkpoints_in,
    checkpoints_of,
    remove,
    remove_unfinished,
    superfluous,
)
from train.checkpoint.open import Standing, open_image, standing
from train.errors import UserError
from train.files import lock_file
from train.run_folder import LOCK_FILE


@dataclass(frozen=True)
class Entry:
    """A checkpoint.

    Attributes:
        step: steps that were done.
        path: its folder.
        faults: what is wrong with it, once per file.
        good: False if it was saved while steps were skipped. This and all that follows: only of one that can be opened.
        bytes: of all files.
        rows: of the tables that were ever updated.
        base: step of the full save that it adds to; bytes and rows are then those that it adds.
        ranks: that wrote it.
        elsewhere: those of them whose parts are on other nodes, and were not examined.
        saved_at: when, UTC.
        format: of its files.
    """

    step: int
    path: str
    faults: list[str] = field(default_factory=list)
    good: bool | None = None
    bytes: int | None = None
    rows: int | None = None
    base: int | None = None
    ranks: int | None = None
    elsewhere: list[int] = field(default_factory=list)
    saved_at: str | None = None
    format: int | None = None

    @classmethod
    def of(cls, step: int, path: Path, *, read: bool) -> "Entry":
        """Examines a checkpoint: manifest, indices and sizes, or with `read` every byte."""
        try:
            image = open_image(path)
            image.check_files()
            faults = [*image.faults()] if read else []
        except (Damaged, UserError) as error:
            return cls(step, str(path), [str(error)])
        manifest = image.manifest
        return cls(
            step,
            str(path),
            faults,
            good=manifest.good,
            bytes=image.bytes,
            rows=manifest.num_rows if manifest.ranks else int(image.spans.column("count").sum()),
            base=manifest.base.step if manifest.base else None,
            ranks=manifest.world_size,
            elsewhere=sorted({rank for part in image.images for rank in part.elsewhere}),
            saved_at=manifest.saved_at,
            format=manifest.format,
        )


def survey(run: Path, *, read: bool, step: int | None = None) -> Iterator[Entry]:
    """The checkpoints of the run in a folder, oldest first, each examined when it is requested.

    Args:
        run: its folder.
        read: every byte.
        step: that of one checkpoint; None for all.

    Raises:
        UserError: there is none.
    """
    return _looked_at(checkpoints_of(run, step), read)


def _looked_at(chosen: list[Found], read: bool) -> Iterator[Entry]:
    for step, path in chosen:
        entry = Entry.of(step, path, read=read)
        # A run at work removes old ones meanwhile: what is gone is not damaged.
        if not entry.faults or path.exists():
            yield entry


@dataclass(frozen=True)
class Pruned:
    """Steps of the checkpoints that were removed, that stay, and of those that stay because they are damaged."""

    removed: list[int]
    kept: list[int]
    damaged: list[int]


def prune(run: Path, *, keep: int, keep_every: int | None, dry_run: bool) -> Pruned:
    """Removes checkpoints that need not stay, once `keep` good ones have been read and found intact.

    Raises:
        UserError: the run is at work, or no checkpoint is intact.
        OSError: the folder cannot be written.
    """
    try:
        lock = lock_file(run / LOCK_FILE).acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run}: a run is at work in it and lets go of checkpoints itself (checkpoint.keep)") from None
    with lock:
        standings: dict[int, Standing] = {}
        damaged = []
        found = checkpoints_in(run / CHECKPOINTS)
        for step, path in reversed(found):
            entry = Entry.of(step, path, read=sum(each.good for each in standings.values()) < keep)
            if entry.faults:
                damaged.append(step)
            else:
                standings[step] = standing(path)
        if not standings:
            raise UserError(f"{run}: no checkpoint is whole; nothing is removed")
        good = {step: each.good for step, each in standings.items()}
        bases = {step: each.base for step, each in standings.items() if each.base is not None}
        ephemeral = {step for step, each in standings.items() if each.ephemeral}
        removed = superfluous(good, keep=keep, keep_every=keep_every, bases=bases, ephemeral=ephemeral)
        if not dry_run:
            remove_unfinished(run / CHECKPOINTS)
            for step, path in found:
                if step in removed:
                    remove(path)
    return Pruned(removed, sorted(good.keys() - set(removed)), sorted(damaged))
