"""Loads this rank's part of a checkpoint into engine and tables."""

from collections.abc import Callable
from pathlib import Path

from offload.tables import EngramTables
from train.checkpoint.delivery import Delivery
from train.checkpoint.index import RowRange
from train.checkpoint.saved_image import SavedImage
from train.checkpoint.together import Failed, together
from train.engine import Engine
from train.errors import UserError


def load(image: SavedImage, delivery: Delivery, engine: Engine, tables: EngramTables | None, *, anew: bool) -> None:
    """Every rank loads what it needs of `image`, of which each reads a part for all. Collective.

    Args:
        image: the checkpoint.
        delivery: its bytes.
        engine, tables: what is loaded into.
        anew: something of another checkpoint may have been loaded before, and is to be forgotten.

    Raises:
        Failed: on all ranks, if one reads what was not saved.
        UserError: the checkpoint is that of another model or optimizer.
    """
    refuse(image.path, lambda: engine.check_state(image))
    if tables is not None:
        if image.bare:
            tables.begin_with_weights(there=len(image.spans) > 0)
        else:
            state = image.manifest.tables or {}
            refuse(image.path, lambda: tables.load_optimizer_state(state))
        if anew:
            tables.forget_rows()
    engine.load_state(delivery)
    if tables is not None:
        taken = together(lambda: _load_rows(delivery, tables, bare=image.bare))
        if sum(taken) != image.spans.column("count").sum():
            raise Failed(f"{sum(taken):,} of its rows are rows of this run's tables, and not all")
    engine.publish_state()


def refuse(path: Path, check: Callable[[], None]) -> None:
    """Runs a check that ends alike on all ranks; ValueError becomes a UserError that names the checkpoint."""
    try:
        check()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _load_rows(delivery: Delivery, tables: EngramTables, *, bare: bool) -> int:
    """Loads this rank's rows, or with `bare` their weights; returns how many these are."""
    owned = tables.owned_rows()

    def wanted(span: RowRange) -> bool:
        return any(span.first < rows.stop and rows.start <= span.last for rows in owned)

    take = tables.load_weights if bare else tables.load_rows
    return sum(take(*(part for part in rows if part is not None)) for rows in delivery.rows(wanted))
