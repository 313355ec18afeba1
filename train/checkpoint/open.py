"""Opens a checkpoint of any format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from train.checkpoint.checked import Damaged
from train.checkpoint.format_1 import Format1Image, state_checksum
from train.checkpoint.huggingface_image import HuggingFaceImage
from train.checkpoint.image import Image
from train.checkpoint.increment import Increment
from train.checkpoint.listing import folder_name, held_ranks
from train.checkpoint.manifest import MANIFEST_FILE, Manifest
from train.checkpoint.saved_image import SavedImage
from train.errors import UserError
from train.huggingface.names import is_folder


class Standing(NamedTuple):
    """What a checkpoint says about itself, as a node sees it.

    Attributes:
        good: whether nothing speaks against continuing from it.
        base: its base's step, if any.
        ephemeral: whether it is removed as soon as there is a newer good one.
        checksum: of its manifest; empty for one without.
        ranks: that wrote it.
        here: those of them whose parts this node has.
    """

    good: bool
    base: int | None = None
    ephemeral: bool = False
    checksum: str = ""
    ranks: int = 1
    here: frozenset[int] = frozenset([0])


def standing(path: Path) -> Standing:
    """What a checkpoint says about itself; one that cannot be read is not good."""
    if not (path / MANIFEST_FILE).exists():
        return Standing(good=True, checksum=state_checksum(path))
    try:
        manifest, found = Manifest.read(path)
    except (Damaged, UserError):
        return Standing(good=False)
    base = manifest.base.step if manifest.base else None
    return Standing(manifest.good, base, manifest.ephemeral, found, manifest.world_size, held_ranks(path))


def open_image(path: Path) -> SavedImage:
    """A checkpoint, or a folder of Hugging Face's that a run can begin with.

    Raises:
        Damaged: it cannot be read, is not what was saved, or its parts do not fit each other; of a checkpoint that adds
            to a full one, also if that is not there.
        UserError: it has a later format.
    """
    if (path / MANIFEST_FILE).exists():
        return open_described(path, Path.read_bytes)
    return HuggingFaceImage(path) if is_folder(path) else Format1Image(path)


def open_all(path: Path) -> SavedImage:
    """The same; raises UserError as well if a part of it is on another node."""
    image = open_image(path)
    for part in image.images:
        if away := part.elsewhere:
            hosts = ", ".join(sorted({part.manifest.nodes[rank] for rank in away if part.manifest.nodes}))
            raise UserError(
                f"{part.path}: has the parts of {len(part.here)} of its {part.manifest.world_size} ranks; "
                f"the others are on {hosts}: copy rank-* from the folder of that name there into this one"
            )
    return image


def open_described(path: Path, read: Callable[[Path], bytes]) -> SavedImage:
    """The same, of today's format, by manifests and indices whose bytes `read` gives; its parts may be elsewhere."""
    image = Image(path, read)
    return Increment(image, open_base(image, read)) if image.manifest.base else image


def open_base(image: Image, read: Callable[[Path], bytes] = Path.read_bytes) -> Image:
    """The full save that one adds to; raises Damaged and UserError as `open_image`."""
    assert image.manifest.base is not None
    path = image.path.with_name(folder_name(image.manifest.base.step))
    try:
        return Image(path, read)
    except Damaged as error:
        raise Damaged(f"{path.name}, the full save that it adds to: {error}") from None
