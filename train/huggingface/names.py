"""Names of files and tensors in Hugging Face's folders; the backbone's are those of DeepSeek-V3's published weights.

They are training's, but for the routed experts, whose weights training stacks: `experts.gate_up_proj` [E, 2F, D] is
`experts.0.gate_proj.weight` [F, D], `experts.0.up_proj.weight` [F, D], `experts.1.gate_proj.weight`, ... there.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
COMPRESSED_IDS = "model.compressed_ids"
"""Int64 tensor beside the backbone's: the id that is hashed for each token id."""
TABLE_TENSOR = "rows"
"""The only tensor of a table's file."""

_STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_OWN = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def is_folder(path: Path) -> bool:
    """Whether a folder has a model's config as Hugging Face lays it out."""
    return (path / CONFIG).is_file()


class Part(NamedTuple):
    """A published tensor, as consecutive elements of one of training's."""

    name: str
    start: int
    """First element, in row-major order."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def table_files(layer: int, count: int) -> list[str]:
    """Names of the files that hold the table of an Engram layer: not beside the backbone's, where readers take every
    safetensors file for its own."""
    return [f"tables/layer-{layer:03d}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def published(name: str, shape: tuple[int, ...]) -> Iterator[Part]:
    """The published tensors that one of training's consists of, in order."""
    if (found := _OWN.fullmatch(name)) is None:
        yield Part(name, 0, shape)
        return
    maps = _STACKED[found[2]]
    experts, rows, columns = shape
    rows //= len(maps)
    for number in range(experts * len(maps)):
        expert, which = divmod(number, len(maps))
        place = f"{found[1]}.{expert}.{maps[which]}.weight"
        yield Part(place, number * rows * columns, (rows, columns))
