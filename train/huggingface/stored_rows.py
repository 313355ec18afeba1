"""The rows of tables in a folder: those of an export of ours, and those of DeepSeek-V4.1's checkpoints.

There, a row is 8-bit floats (e4m3) with an 8-bit exponent as the scale of every 32 of them: tensors `embed.weight`
[R, D] and `embed.scale` [R, D / 32] of `layers.N.engram`, as the released model's index has them.

Shape suffixes: N rows, D columns, G groups of 32 columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from train.errors import UserError
from train.huggingface.folder import Stored, TensorFolder
from train.huggingface.names import TABLE_TENSOR


@dataclass(frozen=True)
class RowFile:
    """Consecutive rows of a table.

    Attributes:
        name: of the file, or of the tensor.
        values: [N, D].
        scales: [N, G], on D / G columns each; None for values as they are.
    """

    name: str
    values: Stored
    scales: Stored | None = None

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return self.values.shape[0]

    def rows(self, first: int, count: int) -> Tensor:
        """Values of some of them, fp32 [count, D]."""
        values_ND = _rows(self.values, first, count)
        if self.scales is None:
            return values_ND
        scales_NG = _rows(self.scales, first, count)
        return values_ND * scales_NG.repeat_interleave(values_ND.shape[1] // scales_NG.shape[1], dim=1)


def _rows(stored: Stored, first: int, count: int) -> Tensor:
    width = stored.shape[1]
    return stored.elements(first * width, count * width).view(count, width).float()


def tables_of(folder: TensorFolder) -> list[list[RowFile]]:
    """For each Engram layer, the files or tensors that, one after another, hold its rows; nothing without memory.

    Raises:
        UserError: one is missing, or is not what the config says.
    """
    text = folder.config.get("text_config", folder.config)
    if "engram_layer_ids" in text:
        numbers = zip(text["engram_layer_ids"], text["engram_num_embeddings"], strict=True)
        return [[_scaled(folder, layer, rows, text["engram_head_dim"])] for layer, rows in numbers]
    engram = folder.config.get("engram")
    return [list(_plain(folder, entry, engram["row_dim"])) for entry in engram["tables"]] if engram else []


def _plain(folder: TensorFolder, entry: dict[str, Any], dim: int) -> Iterator[RowFile]:
    total = 0
    for name in entry["files"]:
        stored = folder.of_file(name).get(TABLE_TENSOR)
        if stored is None or len(stored.shape) != 2 or stored.shape[1] != dim:
            raise UserError(f"{folder.path / name}: has no tensor {TABLE_TENSOR} with {dim} columns")
        total += stored.shape[0]
        yield RowFile(name, stored)
    if total != entry["rows"]:
        raise UserError(f"{folder.path}: the files of layer {entry['layer']} have {total} of {entry['rows']} rows")


def _scaled(folder: TensorFolder, layer: int, rows: int, dim: int) -> RowFile:
    names = [f"{prefix}layers.{layer}.engram.embed" for prefix in ("", "model.")]
    for name in names:
        values, scales = (folder.tensors.get(f"{name}.{part}") for part in ("weight", "scale"))
        if values is None or scales is None:
            continue
        fits = values.shape == (rows, dim) and scales.shape[0] == rows and dim % scales.shape[1] == 0
        if not fits or (values.code, scales.code) != ("F8_E4M3", "F8_E8M0"):
            raise UserError(
                f"{values.file}: {name} is {values.code} {list(values.shape)} with {scales.code} {list(scales.shape)}, "
                f"but F8_E4M3 {[rows, dim]} with F8_E8M0 scales of its columns are expected"
            )
        return RowFile(name, values, scales)
    raise UserError(f"{folder.path}: has no {names[0]}.weight with its .scale; copy all of the model's files")
