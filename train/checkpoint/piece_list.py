"""Many pieces in little memory: a job's checkpoint has some for every 4 MiB, and every rank knows all of them.

As objects they would take 500 bytes each, and those of tables of 400 GB more than all else that a load may hold.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from train.checkpoint.index import Range, RowRange

Piece = TypeVar("Piece", Range, RowRange)
_NAMES = {"tensor", "file"}
_NUMBERS = {"start", "count", "first", "last"}


class PieceList(Sequence[Piece], Generic[Piece]):
    """Pieces in columns, 40 to 76 bytes each; what is asked for is made anew.

    Args:
        kind: what they are.
        columns: a field each; of names, the place among `names`.
        names: of tensors and files, none twice.
    """

    def __init__(self, kind: type[Piece], columns: NDArray[np.void], names: Sequence[str]) -> None:
        self._kind: type[Piece] = kind
        self._columns, self._names = columns, names

    @classmethod
    def of(cls, kind: type[Piece], pieces: Iterable[Piece]) -> Self:
        """The same pieces in the same order."""
        names: dict[str, int] = {}

        def values(piece: Piece) -> Iterator[Any]:
            for name, value in vars(piece).items():
                yield names.setdefault(value, len(names)) if name in _NAMES else value

        return cls(kind, np.array([tuple(values(piece)) for piece in pieces], _dtype(kind)), list(names))

    @classmethod
    def joined(cls, kind: type[Piece], lists: Sequence[Self]) -> Self:
        """One list after another."""
        names = list(dict.fromkeys(name for pieces in lists for name in pieces._names))
        place = {name: number for number, name in enumerate(names)}
        columns = np.empty(sum(map(len, lists)), _dtype(kind))
        end = 0
        for pieces in lists:
            start, end = end, end + len(pieces)
            columns[start:end] = pieces._columns
            places = np.array([place[name] for name in pieces._names], np.int32)
            for field in _NAMES & set(columns.dtype.names or ()):
                columns[field][start:end] = places[pieces._columns[field]]
        return cls(kind, columns, names)

    def column(self, field: str) -> NDArray[Any]:
        """A field of all pieces; of names, their places."""
        return self._columns[field]

    def sorted_by(self, *by: str) -> Self:
        """The same, by the first of these fields, then by the next."""
        alphabet = np.argsort(np.argsort(np.array(self._names, dtype=str)))
        keys = [alphabet[self._columns[name]] if name in _NAMES else self._columns[name] for name in by]
        return type(self)(self._kind, self._columns[np.lexsort(keys[::-1])], self._names)

    def __len__(self) -> int:
        return len(self._columns)

    @overload
    def __getitem__(self, number: int) -> Piece: ...
    @overload
    def __getitem__(self, number: slice) -> Self: ...
    def __getitem__(self, number: int | slice) -> Piece | Self:
        if isinstance(number, slice):
            return type(self)(self._kind, self._columns[number], self._names)
        values = zip(self._columns.dtype.names or (), self._columns[number].item(), strict=True)
        return self._kind(*(self._value(name, value) for name, value in values))

    def _value(self, name: str, value: Any) -> Any:
        if name in _NAMES:
            return self._names[value]
        return value if name in _NUMBERS else value.decode()


def stored_bytes(kind: type[Range | RowRange]) -> int:
    """Bytes of a piece in a list."""
    return _dtype(kind).itemsize


def _dtype(kind: type[Range | RowRange]) -> np.dtype[np.void]:
    """Numbers, places of names, and checksums of 16 digits."""
    return np.dtype(
        [(f.name, "i4" if f.name in _NAMES else "i8" if f.name in _NUMBERS else "S16") for f in fields(kind)]
    )
