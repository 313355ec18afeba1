"""Writes safetensors files piece by piece, so that no tensor need ever be in memory whole.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor),
and the tensors' bytes one after another, row-major and little-endian. The library's own writer needs whole tensors.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written.

    Attributes:
        name, dtype, shape: as they are to be in the file.
        chunks: gives it in pieces, in order, of any shape and of this dtype.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> "TensorSource":
        """An existing tensor, cast as it is written."""
        dtype = dtype or tensor.dtype
        return cls(name, dtype, tuple(tensor.shape), lambda: [tensor.to(dtype)])

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def split(sources: Iterable[TensorSource], limit: int) -> Iterator[list[TensorSource]]:
    """Fills files with tensors in order, up to `limit` bytes each; a larger tensor gets a file of its own."""
    part: list[TensorSource] = []
    size = 0
    for source in sources:
        if part and size + source.bytes > limit:
            yield part
            part, size = [], 0
        part.append(source)
        size += source.bytes
    if part:
        yield part


def write_tensors(path: Path, sources: Sequence[TensorSource]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk is full or cannot be written.
        ValueError: a source's pieces are not what it says.
    """
    with path.open("wb") as file:
        file.write(header(sources))
        for source in sources:
            written = sum(file.write(_bytes(chunk, source)) for chunk in source.chunks())
            if written != source.bytes:
                raise ValueError(f"{source.name}: {written} bytes were given for a tensor of {source.bytes}")


def header(sources: Sequence[TensorSource], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a file of these tensors begins with; `metadata` is for whoever reads it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for source in sources:
        start, end = end, end + source.bytes
        entries[source.name] = {
            "dtype": CODES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; its own memory if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _bytes(chunk: Tensor, source: TensorSource) -> memoryview:
    if chunk.dtype != source.dtype:
        raise ValueError(f"{source.name}: a piece is {chunk.dtype}, not {source.dtype}")
    return tensor_bytes(chunk)
