"""A folder of safetensors files as Hugging Face lays them out, memory-mapped: nothing is read but what is asked for."""

import json
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.errors import UserError
from train.huggingface.names import CONFIG, INDEX

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: its file, its dtype as safetensors calls it, its shape, and its first byte."""

    file: Path
    code: str
    shape: tuple[int, ...]
    start: int

    def elements(self, start: int, count: int) -> Tensor:
        """Consecutive elements, flat, in row-major order; memory-mapped."""
        dtype = _DTYPES[self.code]
        place = self.start + start * dtype.itemsize
        data = np.memmap(self.file, np.uint8, "r", place, (count * dtype.itemsize,))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not writable is what is wanted
            return torch.from_numpy(data).view(dtype)


class TensorFolder:
    """A folder's config and tensors.

    Args:
        path: with `config.json`, and an index or one safetensors file, or all of those that are there.

    Raises:
        UserError: a file is missing, cut short or none of its kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = self._json(CONFIG)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """The tensors of the index, by name."""
        if (self.path / INDEX).exists():
            names = sorted(set(self._json(INDEX).get("weight_map", {}).values()))
        else:
            names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if not names:
            raise UserError(f"{self.path}: has no safetensors file; give a folder with a model's weights")
        return {name: stored for file in names for name, stored in self.of_file(file).items()}

    def of_file(self, name: str) -> dict[str, Stored]:
        """The tensors of one file.

        Raises:
            UserError: it is missing, cut short or no safetensors file, or has a dtype that is not known here.
        """
        path = self.path / name
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length)) if length < size else None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            entries = None
        if not isinstance(entries, dict):
            raise UserError(f"{path}: no safetensors file, or cut short; copy it anew")
        found = {}
        for tensor, entry in entries.items():
            if tensor == "__metadata__":
                continue
            stored = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            if stored.code not in _DTYPES:
                raise UserError(f"{path}: {tensor} is {stored.code}; convert it to one of {', '.join(_DTYPES)}")
            if stored.start + math.prod(stored.shape) * _DTYPES[stored.code].itemsize > size:
                raise UserError(f"{path}: is cut short within {tensor}; copy it anew")
            found[tensor] = stored
        return found

    def _json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise UserError(f"{path}: no JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError(f"{path}: no JSON object")
        return values
