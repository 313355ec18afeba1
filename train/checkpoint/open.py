"""Opens a checkpoint of any format."""

from pathlib import Path
from typing import NamedTuple

from train.checkpoint.checked import Damaged
from train.checkpoint.format_1 import Format1Image
from train.checkpoint.image import Image, SavedImage
from train.checkpoint.increment import Increment
from train.checkpoint.listing import folder_name
from train.checkpoint.manifest import MANIFEST_FILE, Base, Manifest
from train.errors import UserError


class Standing(NamedTuple):
    """Whether nothing that a checkpoint says of itself speaks against going on from it; its base's step, if any."""

    good: bool
    base: int | None = None


def standing(path: Path) -> Standing:
    """What a checkpoint says of itself; one that cannot be read is not good."""
    try:
        manifest = Manifest.read(path)[0] if (path / MANIFEST_FILE).exists() else None
    except (Damaged, UserError):
        return Standing(good=False)
    return Standing(manifest.good, manifest.base.step if manifest.base else None) if manifest else Standing(good=True)


def open_image(path: Path) -> SavedImage:
    """A checkpoint.

    Raises:
        Damaged: it cannot be read, is not what was saved, or its parts do not fit each other; of a checkpoint that adds
            to a full one, also if that is not there.
        UserError: it has a later format.
    """
    if not (path / MANIFEST_FILE).exists():
        return Format1Image(path)
    image = Image(path)
    return Increment(image, _base(image, image.manifest.base)) if image.manifest.base else image


def _base(image: Image, base: Base) -> Image:
    path = image.path.with_name(folder_name(base.step))
    try:
        return Image(path)
    except Damaged as error:
        raise Damaged(f"{path.name}, the full save that it adds to: {error}") from None
