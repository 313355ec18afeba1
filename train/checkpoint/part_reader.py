"""The part files of a checkpoint, read tensor by tensor; nothing is returned whose checksum was not compared."""

import functools
import json
import mmap
import os
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train.checkpoint.checked import Checksum, Damaged, checksum, reading
from train.checkpoint.index import PartFile, Save
from train.checkpoint.tensor_files import DTYPES, tensor_bytes

_AT_ONCE = 1 << 20
"""Bytes that are read, and then added to the checksum while they are in the core's cache."""


class _Place(NamedTuple):
    """A tensor in a file: bytes [start, end)."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    end: int


class PartReader:
    """The files that ranks wrote.

    Args:
        folder: of the checkpoint.
        files: of each save by a rank.
    """

    def __init__(self, folder: Path, files: Mapping[Save, Iterable[PartFile]]) -> None:
        self._folder = folder
        self._files = {file.name: (file, save) for save, of_save in files.items() for file in of_save}
        self._verified: set[tuple[str, str]] = set()
        self._places = functools.lru_cache(64)(self._read_places)
        self._map = functools.lru_cache(64)(self._open_map)

    def rank(self, file: str) -> int:
        """The rank that wrote a file."""
        return self._files[file][1].rank

    def wrong_sizes(self, ranks: Collection[int]) -> dict[int, str]:
        """What is wrong with the first file of each of these ranks that is missing or has another size."""
        found: dict[int, str] = {}
        for name, (file, save) in self._files.items():
            if save.rank not in ranks or save.rank in found:
                continue
            try:
                with reading(self._folder / name):
                    size = (self._folder / name).stat().st_size
                _check_size(file, size)
            except Damaged as error:
                found[save.rank] = str(error)
        return found

    def expect(self, file: str, name: str) -> None:
        """Tells the system that a tensor will be read soon. What is wrong with it, `read` tells."""
        with suppress(Damaged, OSError), (self._folder / file).open("rb", buffering=0) as stream:
            place = self._place(file, name)
            os.posix_fadvise(stream.fileno(), place.start, place.end - place.start, os.POSIX_FADV_WILLNEED)

    def read(self, file: str, name: str, expected_sum: str) -> Tensor:
        """A tensor of a file, in memory of its own.

        Raises:
            Damaged: the file is missing or cut short, of another save, or not what was saved.
        """
        place = self._place(file, name)
        values = torch.empty(place.shape, dtype=place.dtype)
        path, data = self._folder / file, tensor_bytes(values)
        with reading(path), path.open("rb", buffering=0) as stream:
            stream.seek(place.start)
            filled, found = data, Checksum()
            while filled and (count := stream.readinto(filled[:_AT_ONCE])):
                found.add(filled[:count])
                filled = filled[count:]
        # What a file that was cut short meanwhile did not fill is other bytes than those that were saved.
        if filled or found.text() != expected_sum:
            raise Damaged(f"{file} is not what was saved (the checksum of {name} differs)")
        self._verified.add((file, name))
        return values

    def mapped(self, file: str, name: str, expected_sum: str) -> Tensor:
        """As `read`, but memory-mapped once it was compared: to pick a little of a tensor, again and again."""
        if (file, name) not in self._verified:
            self.read(file, name, expected_sum)
        place = self._place(file, name)
        if place.start == place.end:
            return torch.empty(place.shape, dtype=place.dtype)
        data = memoryview(self._map(file))[place.start : place.end]
        return torch.frombuffer(data, dtype=place.dtype).view(place.shape)

    def _place(self, file: str, name: str) -> _Place:
        places = self._places(file)
        if name not in places:
            raise Damaged(f"{file} has no {name}")
        return places[name]

    def _open_map(self, name: str) -> mmap.mmap:
        path = self._folder / name
        with reading(path), path.open("rb") as stream:
            # Private and writable: PyTorch assumes that it may write to any memory.
            return mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def _read_places(self, name: str) -> dict[str, _Place]:
        """Where the tensors of a file are, from its header."""
        file, save = self._files[name]
        path = self._folder / name
        with reading(path), path.open("rb") as stream:
            _check_size(file, os.fstat(stream.fileno()).st_size)
            length = stream.read(8)
            start = length + stream.read(min(int.from_bytes(length, "little"), file.bytes))
        if checksum(start) != file.header_sum:
            raise Damaged(f"{name} {_whose(start, save)}")
        header = json.loads(start[8:])
        header.pop("__metadata__")
        return {
            key: _Place(DTYPES[e["dtype"]], e["shape"], *(len(start) + place for place in e["data_offsets"]))
            for key, e in header.items()
        }


def _check_size(file: PartFile, size: int) -> None:
    if size != file.bytes:
        raise Damaged(f"{file.name} has {size:,} bytes, {file.bytes:,} were saved")


def _whose(start: bytes, save: Save) -> str:
    """What is wrong with a header that is not the one that was saved."""
    try:
        found = json.loads(start[8:])["__metadata__"]
        other = {key: found[key] for key, value in save.metadata().items() if found[key] != value}
    except (ValueError, KeyError, TypeError):
        other = {}
    if not other:
        return "is not what was saved (the checksum of its header differs)"
    return "is of another save: " + ", ".join(f"{key} {value}" for key, value in other.items())
