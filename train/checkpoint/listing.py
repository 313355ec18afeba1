"""Which checkpoints there are in a folder, and which of them may go. Nothing is read but names."""

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from train.errors import UserError
from train.huggingface.names import is_folder
from train.run_folder import RUNS

CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""
_DESCRIPTIONS = ("manifest.json", "state.json")
"""Files that are written last: of today's format, and of the first one."""
_NAME = re.compile(r"step-(\d{8,})")
_INDEX = re.compile(r"rank-(\d{5,})\.json")
_UNFINISHED = re.compile(r"\.(step-\d{8,}|probe)\..*(partial|removed|replaced)")


def folder_name(step: int) -> str:
    """Name of the folder of a checkpoint after `step` steps."""
    return f"step-{step:08d}"


class Found(NamedTuple):
    """A complete checkpoint: the steps that were done, and its folder."""

    step: int
    path: Path


def checkpoints_in(folder: Path) -> list[Found]:
    """The complete checkpoints in a folder, by step; none if there is no such folder."""
    entries = folder.iterdir() if folder.is_dir() else ()
    named = [(name, path) for path in entries if (name := _NAME.fullmatch(path.name)) and is_checkpoint(path)]
    return sorted(Found(int(name[1]), path) for name, path in named)


def checkpoints_of(run: Path, step: int | None = None) -> list[Found]:
    """The complete checkpoints of a run, by step: all of them, or the one of `step`.

    Raises:
        UserError: there is none.
    """
    found = checkpoints_in(run / CHECKPOINTS)
    if not found:
        raise UserError(f"{run}: no checkpoint yet; train for longer, or lower checkpoint.every")
    chosen = [entry for entry in found if step in (None, entry.step)]
    if not chosen:
        there = ", ".join(str(entry.step) for entry in found)
        raise UserError(f"{run}: no checkpoint of step {step}; there are: {there}")
    return chosen


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a complete checkpoint."""
    return any((path / name).is_file() for name in _DESCRIPTIONS)


def held_ranks(path: Path) -> frozenset[int]:
    """The ranks whose parts a checkpoint's folder has; of those that other nodes have, it has copies of indices."""
    return frozenset(int(name[1]) for file in path.glob("rank-*.json") if (name := _INDEX.fullmatch(file.name)))


def find_checkpoint(source: str, key: str) -> Path:
    """The checkpoint, or folder of Hugging Face's, that `source` is, or the newest one of the run that it is.

    Args:
        source: a folder, or the name of a run in `runs`.
        key: where the user gave it, for the message.

    Raises:
        UserError: there is none.
    """
    if is_checkpoint(Path(source)) or is_folder(Path(source)):
        return Path(source)
    for run in (Path(source), Path(RUNS, source)):
        if found := checkpoints_in(run / CHECKPOINTS):
            return found[-1].path
    raise UserError(f"{key}: {source} is no checkpoint, and no run with one in it")


def superfluous(
    steps: dict[int, bool],
    *,
    keep: int,
    keep_every: int | None,
    bases: Mapping[int, int] | None = None,
    ephemeral: Collection[int] = (),
) -> list[int]:
    """Of the steps of a run's checkpoints, those that need not stay.

    The newest stays, whatever it is, and so do the newest good one and `keep` of the good ones that are not ephemeral:
    what is not good displaces nothing. So does what one of these adds to.

    Args:
        steps: by step, whether the checkpoint is known to be good.
        keep: how many of the newest good ones stay.
        keep_every: good ones of multiples of it stay as well; None for none.
        ephemeral: those that stay only while none is newer.
        bases: of those that add to a full save, that one's step.
    """
    good = sorted(step for step, is_good in steps.items() if is_good)
    kept = {*good[-1:], max(steps, default=0)}
    good = [step for step in good if step not in ephemeral]
    kept |= {*good[-keep:]}
    if keep_every:
        kept |= {step for step in good if step % keep_every == 0}
    kept |= {base for step, base in (bases or {}).items() if step in kept}
    return sorted(steps.keys() - kept)


def remove(path: Path) -> None:
    """Removes a checkpoint; at no time is there half of one under its name."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def remove_unfinished(folder: Path, but: Collection[str] = ()) -> None:
    """Removes what interrupted saves and removals left behind. Nobody else may be at work in the folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _UNFINISHED.fullmatch(path.name) and path.name not in but:
            shutil.rmtree(path, ignore_errors=True)
