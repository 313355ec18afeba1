"""Opens a checkpoint of any format."""

from pathlib import Path

from train.checkpoint.checked import Damaged
from train.checkpoint.format_1 import Format1Image
from train.checkpoint.image import Image, SavedImage
from train.checkpoint.manifest import MANIFEST_FILE, Manifest
from train.errors import UserError


def is_good(path: Path) -> bool:
    """Whether nothing that a checkpoint says of itself speaks against going on from it."""
    try:
        return Manifest.read(path)[0].good if (path / MANIFEST_FILE).exists() else True
    except (Damaged, UserError):
        return False


def open_image(path: Path) -> SavedImage:
    """A checkpoint.

    Raises:
        Damaged: it cannot be read, is not what was saved, or its parts do not fit each other.
        UserError: it has a later format.
    """
    return Image(path) if (path / MANIFEST_FILE).exists() else Format1Image(path)
