"""Megatron's indexed dataset: the index file (`.idx`) that marks sequences and documents in a token file (`.bin`).

Layout, little-endian, as Megatron-Core's `core/datasets/indexed_dataset.py` reads and writes it:

    magic            9 bytes    "MMIDIDX" and two zero bytes
    version          uint64     1
    dtype            uint8      code of the tokens' type, see DTYPES
    sequences        uint64     N
    document marks   uint64     M + 1 for M documents
    lengths          int32[N]   tokens of each sequence
    pointers         int64[N]   byte offset of each sequence in the .bin file
    document index   int64[M+1] document m is the sequences [index[m], index[m+1])
    modes            int8[N]    only in multimodal data sets, ignored here
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from train.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Type codes that can hold tokens. Codes 6 and 7 are the two float types, whose order differs among versions."""

_HEADER = struct.Struct("<9sQBQQ")


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65,500 entries, else int32: Megatron's rule, so that its tools produce the same files."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class Index(NamedTuple):
    """Contents of an index file, memory-mapped."""

    dtype: np.dtype
    """Type of the tokens in the `.bin` file."""
    lengths: np.ndarray
    """int32 [N]: tokens of each sequence."""
    pointers: np.ndarray
    """int64 [N]: byte offset of each sequence."""
    documents: np.ndarray
    """int64 [M + 1]: first sequence of each document, then N."""

    def document_offsets(self) -> np.ndarray:
        """int64 [M + 1]: first token of each document in the `.bin` file, then the number of tokens.

        Raises:
            ValueError: sequences that do not follow one another, or documents out of order.
        """
        itemsize = self.dtype.itemsize
        starts = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=starts[1:])
        if not np.array_equal(starts[:-1] * itemsize, self.pointers):
            raise ValueError("its sequences are not contiguous")
        if self.documents[0] != 0 or self.documents[-1] != len(self.lengths) or np.any(np.diff(self.documents) < 0):
            raise ValueError("its document index is out of order")
        return starts[self.documents]


def write_index(stream: BinaryIO, dtype: np.dtype, lengths: np.ndarray) -> None:
    """Writes the index of documents of one sequence each.

    Args:
        stream: binary file, at its start.
        dtype: type of the tokens in the `.bin` file, one of DTYPES.
        lengths: int32 [N], tokens of each document in file order.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    pointers = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], out=pointers[1:], dtype="<i8")
    pointers *= dtype.itemsize
    stream.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
    stream.write(lengths.astype("<i4").tobytes())
    stream.write(pointers.tobytes())
    stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_index(path: Path) -> Index:
    """Maps an index file.

    Raises:
        UserError: missing, not an index file, of another version, or cut short.
    """
    try:
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror})") from None
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{path}: not the index of a Megatron indexed dataset (wrong first bytes)")
    _, version, code, sequences, marks = _HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise UserError(f"{path}: index version {version}, token type code {code}; known: 1, {sorted(DTYPES)}")
    size = path.stat().st_size
    plain = _HEADER.size + 12 * sequences + 8 * marks
    if marks < 1 or size not in (plain, plain + sequences):
        raise UserError(f"{path}: {size} bytes, {plain} expected for its {sequences} sequences: truncated or damaged")
    raw = np.memmap(path, dtype=np.uint8, mode="r")

    def column(kind: str, count: int, offset: int) -> np.ndarray:
        return np.frombuffer(raw, dtype=kind, count=count, offset=offset)

    lengths = column("<i4", sequences, _HEADER.size)
    pointers = column("<i8", sequences, _HEADER.size + 4 * sequences)
    return Index(DTYPES[code], lengths, pointers, column("<i8", marks, _HEADER.size + 12 * sequences))
