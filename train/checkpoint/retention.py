"""Removes the checkpoints of a run that need not stay, on all nodes alike."""

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path

from train.checkpoint.choice import Key
from train.checkpoint.listing import checkpoints_in, folder_name, remove, superfluous
from train.checkpoint.nodes import Nodes
from train.checkpoint.open import Standing, standing
from train.config.job import CheckpointConfig


def let_go(folder: Path, step: int, config: CheckpointConfig, passed_over: Collection[Key], nodes: Nodes) -> str:
    """Removes what need not stay once `step` is saved; later ones, not continued from, wait. Collective.

    Returns:
        the checksum of the manifest of what was saved.
    """

    def look() -> dict[int, Standing]:
        return {found.step: standing(found.path) for found in checkpoints_in(folder) if found.step <= step}

    on_nodes = nodes.on_leaders(look).values()
    whole = {
        there: _whole(found for standings in on_nodes if (found := standings.get(there)))
        for there in {there for standings in on_nodes for there in standings}
    }
    good = {
        there: found is not None and found.good and Key(folder_name(there), found.checksum) not in passed_over
        for there, found in whole.items()
    }
    bases = {there: found.base for there, found in whole.items() if found and found.base is not None}
    ephemeral = {there for there, found in whole.items() if found and found.ephemeral}
    old = superfluous(good, keep=config.keep, keep_every=config.keep_every, bases=bases, ephemeral=ephemeral)

    def remove_old() -> None:
        for path in (path for there, path in checkpoints_in(folder) if there in old):
            # The next save will report a full disk.
            with contextlib.suppress(OSError):
                remove(path)

    nodes.on_leaders(remove_old)
    saved = whole[step]
    assert saved is not None
    return saved.checksum


def _whole(standings: Iterable[Standing]) -> Standing | None:
    """Of what nodes have under one name, that of which they have all parts together."""
    here: dict[str, frozenset[int]] = {}
    for found in standings:
        here[found.checksum] = here.get(found.checksum, frozenset()) | found.here
        if len(here[found.checksum]) == found.ranks:
            return found
    return None
