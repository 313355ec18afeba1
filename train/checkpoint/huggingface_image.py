"""A folder of Hugging Face's as a checkpoint to begin a run with: weights and rows, without optimizer state.

Each tensor of training's is one or, for stacked experts, several of the folder's; all become fp32. What the run's model
adds to the folder's (Engram, hyper-connections) is not there, and begins as `beginning` says.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError

from model.config import ModelConfig
from model.parameters import kind_of
from model.transformer import LanguageModel
from train.checkpoint.checked import Damaged, checksum
from train.checkpoint.index import Range, RowRange
from train.checkpoint.manifest import Manifest
from train.checkpoint.parts import PIECE_BYTES
from train.checkpoint.piece_list import PieceList
from train.checkpoint.saved_image import Home, SavedImage, SavedParts, SavedRows
from train.errors import UserError
from train.huggingface.block_scaled import BlockScaled, weights_of
from train.huggingface.folder import Stored, TensorFolder
from train.huggingface.names import COMPRESSED_IDS, CONFIG, INDEX, published
from train.huggingface.settings import Settings, settings_of
from train.huggingface.stored_rows import RowFile, tables_of
from train.optim.pieces import BUFFER, WEIGHT, Beginning, StatePiece, TensorInfo

_ADDED = {"engram_projections", "engram_vectors", "hyper_connections"}


class HuggingFaceImage(SavedImage):
    """See `train.checkpoint.saved_image.SavedImage`.

    Raises:
        Damaged: the folder is no model that a run can begin with; the message tells why.
    """

    bare = True
    steps = 0
    images: tuple[SavedParts, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path, self.here = path, frozenset([0])
        try:
            self._folder = TensorFolder(path)
            self.settings: Settings = settings_of(self._folder.config)
            self._weights = weights_of(self._folder, self.settings.block) if self.settings.backbone else {}
            self._parts = dict(self._match()) if self.settings.backbone else {}
            self._tables = tables_of(self._folder)
        except UserError as error:
            raise Damaged(str(error)) from None
        except (KeyError, TypeError, AttributeError) as error:
            raise Damaged(f"{CONFIG} is none of a model that is known here ({error!r})") from None
        texts = [path / name for name in (CONFIG, INDEX)]
        self.checksum = checksum(b"".join(text.read_bytes() for text in texts if text.exists()))
        self.ranges = PieceList.of(Range, self._cut())
        self.spans = PieceList.of(RowRange, self._cut_rows())
        self.manifest = Manifest(
            step=0, steps_applied=0, nonce="", world_size=1, skipped_in_a_row=0, model={}, addresses=None, data={},
            tokenizer=None, data_changes=[], tables=None, tensors={}, ranks=[], saved_at="",
        )  # fmt: skip

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """See `SavedImage.tensors`."""
        return {name: TensorInfo(torch.float32, shape) for name, (shape, _) in self._parts.items()}

    @property
    def bytes(self) -> int:
        """See `SavedImage.bytes`."""
        return sum(file.stat().st_size for file in self.path.rglob("*.safetensors"))

    def beginning(self, tensor: str) -> Beginning | None:
        """See `SavedState.beginning`: a model that is given computes at first what it did, whatever is added to it."""
        kind, _, name = tensor.partition("/")
        if kind not in (WEIGHT, BUFFER) or not self.settings.backbone:
            return Beginning.DRAWN
        if kind_of(name).part not in _ADDED:
            return None
        return Beginning.ZERO if name.endswith(".engram.value_proj.weight") else Beginning.DRAWN

    def check_files(self) -> None:
        """See `SavedImage.check_files`: their sizes were compared with their headers when they were opened."""

    def home(self, piece: Range | RowRange) -> Home:
        """See `SavedImage.home`."""
        return Home(self.path.name, 0)

    def expect(self, piece: Range | RowRange) -> None:
        """See `SavedImage.expect`: mapped memory is read ahead as it is."""

    def piece(self, place: Range) -> StatePiece:
        """See `SavedImage.piece`."""
        start, stored = self._stored[place.file]
        return StatePiece(place.tensor, place.start, stored.elements(place.start - start, place.count).float())

    def rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.rows`; the records are weights alone, [N, D]."""
        first, table = self._row_files[span.file]
        return SavedRows(torch.arange(span.first, span.last + 1), table.rows(span.first - first, span.count))

    def mapped_rows(self, span: RowRange) -> SavedRows:
        """See `SavedImage.mapped_rows`."""
        return self.rows(span)

    def faults(self) -> Iterator[str]:
        """See `SavedImage.faults`: there are no checksums to compare with."""
        return iter(())

    def _match(self) -> Iterator[tuple[str, tuple[tuple[int, ...], list[tuple[str, int, int]]]]]:
        """Each tensor of training's, with its shape and the folder's tensors in it: name, first element, elements.

        Raises:
            UserError: the folder lacks one, has one of another shape, or has one that is not training's.
        """
        layers = self.settings.model["num_layers"]
        beyond = tuple(f"model.layers.{layer}." for layer in range(layers, layers + 9))  # of multi-token prediction
        left = {name for name in self._weights if not name.startswith(beyond)}
        left -= {COMPRESSED_IDS, *(("lm_head.weight",) if self.settings.model["tie_embeddings"] else ())}
        for kind, name, shape in self._wanted():
            places = []
            for part in published(name, shape):
                there = self._weights.get(part.name)
                if there is None or there.shape != part.shape:
                    what = "is not there" if there is None else f"has shape {list(there.shape)}"
                    raise UserError(f"{part.name} {what}, but {CONFIG} asks for {list(part.shape)}")
                places.append((part.name, part.start, part.size))
                left.discard(part.name)
            yield f"{kind}/{name}", (shape, places)
        if left := {name for name in left if not name.endswith("rotary_emb.inv_freq")}:
            raise UserError(f"has a tensor {min(left)}, which this model does not")

    def _wanted(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Kind, name and shape of what the folder's own model has in training."""
        try:
            config = ModelConfig.model_validate(self.settings.model)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise UserError(f"{CONFIG}: {'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
        with torch.device("meta"):
            model = LanguageModel(config)
        buffers = {name for name, _ in model.named_buffers()}
        for name, tensor in model.state_dict().items():
            if name != "lm_head.weight" or not config.tie_embeddings:
                yield BUFFER if name in buffers else WEIGHT, name, tuple(tensor.shape)

    @cached_property
    def _stored(self) -> dict[str, tuple[int, Stored | BlockScaled]]:
        """By name in the folder, where the tensor starts in training's, and where it is."""
        places = (place for _, each in self._parts.values() for place in each)
        return {name: (start, self._weights[name]) for name, start, _ in places}

    def _cut(self) -> Iterator[Range]:
        step = PIECE_BYTES // 4
        for tensor, (_, places) in sorted(self._parts.items()):
            for name, first, size in places:
                for start in range(first, first + size, step):
                    yield Range(tensor, start, min(step, first + size - start), "", name)

    @cached_property
    def _row_files(self) -> dict[str, tuple[int, RowFile]]:
        """By name, the job-wide id of the first row of each file or tensor of rows."""
        found, first = {}, 0
        for table in itertools.chain.from_iterable(self._tables):
            found[table.name] = first, table
            first += table.num_rows
        return found

    def _cut_rows(self) -> Iterator[RowRange]:
        engram = self.settings.model.get("engram")
        step = max(1, PIECE_BYTES // 4 // engram["row_dim"]) if engram else 1
        for name, (first, table) in self._row_files.items():
            for start in range(first, first + table.num_rows, step):
                end = min(start + step, first + table.num_rows)
                yield RowRange(start, end - 1, end - start, "", "", "", name)
