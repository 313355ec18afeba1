"""Checkpoints of the first format, which are still read; nothing writes them.

    state.json                          step, what the run was (model, addresses, data), table optimizer, file list
    backbone.safetensors                all tensors, whole
    tables-00000-of-00002.safetensors   of each rank: `ids.N` and `records.N` of the rows that it owned

They have no checksums: the only faults found are what the safetensors library reports, and missing rows or tensors.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from train.checkpoint.checked import Damaged, checksum, reading
from train.checkpoint.image import Image
from train.checkpoint.index import Range, RowRange
from train.checkpoint.manifest import Manifest
from train.checkpoint.parts import PIECE_BYTES
from train.checkpoint.piece_list import PieceList
from train.checkpoint.saved_image import Home, SavedImage, SavedRows, check_rows
from train.checkpoint.tensor_files import DTYPES
from train.errors import UserError
from train.optim.pieces import StatePiece, TensorInfo

STATE_FILE = "state.json"
BACKBONE_FILE = "backbone.safetensors"
_STATE_KEYS = {"format", "step", "steps_applied", "model", "addresses", "data", "tables", "table_files"}


class Format1Image(SavedImage):
    """A checkpoint of the first format."""

    bare = False

    def __init__(self, path: Path) -> None:
        self.path, self.here = path, frozenset([0])
        state, self.checksum = _read_state(path)
        with self._open(BACKBONE_FILE) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self._shapes = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
        self._numbers: dict[tuple[str, int], str] = {}
        chunks = (chunk for name in state["table_files"] for chunk in self._chunks(name))
        self.spans = PieceList.of(RowRange, chunks).sorted_by("first")
        self.ranges = PieceList.of(Range, self._cut())
        self._files = [BACKBONE_FILE, *state["table_files"]]
        self.manifest = Manifest(
            step=state["step"],
            steps_applied=state["steps_applied"],
            nonce="",
            world_size=max(1, len(state["table_files"])),
            skipped_in_a_row=0,
            model=state["model"],
            addresses=state["addresses"],
            data=state["data"],
            tokenizer=None,
            data_changes=[],
            tables=state["tables"],
            tensors=self._shapes,
            ranks=[],
            saved_at="",
            format=1,
        )

    @property
    def steps(self) -> int:
        """See `SavedImage.steps`."""
        return self.manifest.steps_applied

    @property
    def images(self) -> tuple[Image, ...]:
        """See `SavedImage.images`: none."""
        return ()

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """See `SavedImage.tensors`."""
        return self.manifest.infos()

    @property
    def bytes(self) -> int:
        """See `SavedImage.bytes`."""
        return sum((self.path / name).stat().st_size for name in self._files)

    def check_files(self) -> None:
        """See `SavedImage.check_files`: all files were opened before."""

    def home(self, piece: Range | RowRange) -> Home:
        """See `SavedImage.home`."""
        return Home(self.path.name, 0)

    def expect(self, piece: Range | RowRange) -> None:
        """See `SavedImage.expect`: mapped memory is read ahead as it is."""

    def piece(self, place: Range) -> StatePiece:
        """See `SavedImage.piece`: memory-mapped."""
        with self._open(BACKBONE_FILE) as file:
            values = file.get_tensor(place.tensor).view(-1)
        return StatePiece(place.tensor, place.start, values[place.start : place.start + place.count])

    def rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.rows`."""
        rows = self.mapped_rows(span)
        tables = self.manifest.tables
        check_rows(span, rows, applied=len(tables["learning_rates"]) if tables else 0)
        return rows

    def mapped_rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.mapped_rows`."""
        number = self._numbers[span.file, span.first]
        with self._open(span.file) as file:
            return SavedRows(file.get_tensor(f"ids.{number}"), file.get_tensor(f"records.{number}"))

    def faults(self) -> Iterator[str]:
        """See `SavedImage.faults`."""
        for span in self.spans:
            try:
                self.rows(span)
            except Damaged as error:
                yield str(error)

    def _chunks(self, name: str) -> Iterator[RowRange]:
        with self._open(name) as file:
            for number in (key.removeprefix("ids.") for key in file.keys() if key.startswith("ids.")):  # noqa: SIM118
                ids = file.get_tensor(f"ids.{number}")
                self._numbers[name, int(ids[0])] = number
                yield RowRange(int(ids[0]), int(ids[-1]), len(ids), "", "", "", name)

    def _cut(self) -> Iterator[Range]:
        for name, (code, shape) in sorted(self._shapes.items()):
            size, step = math.prod(shape), PIECE_BYTES // DTYPES[code].itemsize
            for start in range(0, size, step):
                yield Range(name, start, min(step, size - start), "", BACKBONE_FILE)

    @contextmanager
    def _open(self, name: str) -> Iterator[safe_open]:
        with reading(self.path / name):
            try:
                with safe_open(self.path / name, framework="pt") as file:
                    yield file
            except SafetensorError as error:
                raise Damaged(f"{name} cannot be read ({error})") from None


def state_checksum(folder: Path) -> str:
    """What stands for all of a checkpoint; empty if it cannot be read."""
    try:
        return checksum((folder / STATE_FILE).read_bytes())
    except OSError:
        return ""


def _read_state(folder: Path) -> tuple[dict[str, Any], str]:
    with reading(folder / STATE_FILE):
        text = (folder / STATE_FILE).read_bytes()
    try:
        state = json.loads(text)
    except ValueError as error:
        raise Damaged(f"{STATE_FILE} cannot be read ({error})") from None
    if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS:
        raise Damaged(f"{STATE_FILE} is not that of a checkpoint")
    if state["format"] != 1:
        raise UserError(f"{folder}: has format {state['format']}, of which there is no {STATE_FILE}")
    return state, checksum(text)
