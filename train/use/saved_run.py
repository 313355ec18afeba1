"""A run read back for use: its config, tokenizer and one checkpoint, in one process and without DeepSpeed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self, TypeVar

import torch

from model.transformer import LanguageModel
from offload.addresses.hashing import AddressBook
from train.checkpoint.checked import Damaged
from train.checkpoint.listing import checkpoints_of
from train.checkpoint.open import open_all
from train.checkpoint.saved_image import SavedImage
from train.checkpoint.saved_tables import SavedTables
from train.checkpoint.saved_weights import SavedWeights
from train.config.file import load
from train.config.job import JobConfig
from train.data.blend import Blend
from train.data.tokenization.tokenizer import TOKENIZER, Tokenizer
from train.errors import UserError
from train.run_folder import CONFIG_FILE, find_run
from train.tables import TokenSource, address_book

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
T = TypeVar("T")


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of a run, and what it takes to understand it. Opened by `open`.

    Attributes:
        folder: of the run.
        job: its resolved config.
        image: the checkpoint.
    """

    folder: Path
    job: JobConfig
    image: SavedImage

    @classmethod
    def open(cls, run: str | Path, step: int | None = None) -> Self:
        """Opens the newest checkpoint of a run, or that of a step.

        Args:
            run: the run's folder, or the name of one in `runs`.
            step: steps that the checkpoint has.

        Raises:
            UserError: no such run or checkpoint, or the checkpoint is damaged.
        """
        folder = find_run(run)
        checkpoint = checkpoints_of(folder, step)[-1].path
        image = _whole(checkpoint, lambda: open_all(checkpoint))
        return cls(folder, load(folder / CONFIG_FILE, [], JobConfig), image)

    @property
    def step(self) -> int:
        """Steps that the checkpoint has."""
        return self.image.manifest.step

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the run's text was tokenized with: from the run's folder, or else from its data.

        Raises:
            UserError: neither is there, or what is there is not the checkpoint's.
        """
        path = self.folder / TOKENIZER
        found = Tokenizer.load(path) if path.exists() else self._blend().store.tokenizer()
        if self.image.manifest.tokenizer not in (None, found.sha256):
            raise UserError(
                f"{path if path.exists() else self.job.data.shown}: another tokenizer than the one that "
                f"{self.image.path} was trained with; put that one at {path}"
            )
        return found

    def _blend(self) -> Blend:
        return Blend.open(self.job.data, self.job.train.global_batch_size)

    def addresses(self, source: TokenSource | None = None) -> AddressBook | None:
        """Where the model's rows are for the tokens of `source` (of the run's tokenizer); None without Engram.

        Raises:
            UserError: for these tokens they are not where training put them.
        """
        book = address_book(self.job.model, source or RunTokens(self.tokenizer))
        if (book.fingerprint() if book else None) != self.image.manifest.addresses:
            raise UserError(
                f"{self.image.path}: its table addresses come from another tokenizer or Engram config; use text "
                f"prepared with {self.folder / TOKENIZER}"
            )
        return book

    def tables(self, addresses: AddressBook | None = None) -> SavedTables | None:
        """The tables, read row by row from the checkpoint; None without Engram.

        Raises:
            UserError: they were made with other settings than the config's.
        """
        book = addresses or self.addresses()
        return _whole(self.image.path, lambda: SavedTables(self.image, self.job, book)) if book else None

    def weights(self) -> SavedWeights:
        """fp32 weights and buffers of the backbone by name; each is read when it is asked for."""
        return SavedWeights(self.image)

    def model_buffers(self) -> set[str]:
        """Names among `weights` of what no optimizer moves: it keeps its dtype."""
        with torch.device("meta"):
            return {name for name, _ in LanguageModel(self.job.model).named_buffers()}

    def model(self) -> LanguageModel:
        """The backbone, in the dtype and on the device that it would be trained with here; in evaluation mode.

        Raises:
            UserError: the weights are damaged, or not those of the config's model.
        """
        with torch.random.fork_rng(devices=[]):
            model = LanguageModel(self.job.model)
        weights, targets = self.weights(), dict(model.state_dict())
        if self.job.model.tie_embeddings:
            del targets["lm_head.weight"]
        shapes = {name: tuple(target.shape) for name, target in targets.items()}
        saved = {name: weights.info(name).shape for name in weights}
        if wrong := [name for name in sorted({*shapes, *saved}) if shapes.get(name) != saved.get(name)]:
            raise UserError(f"{self.image.path}: its weights are not those of {CONFIG_FILE} (see {wrong[0]})")
        for name, target in targets.items():
            _whole(self.image.path, lambda name=name, target=target: weights.copy_to(name, target))  # type: ignore[misc]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return model.to(device, DTYPES[self.job.train.dtype]).eval().requires_grad_(False)


@dataclass(frozen=True)
class RunTokens:
    """The tokens of a tokenizer, where there is no store of them."""

    of: Tokenizer

    @property
    def pad_id(self) -> int:
        """Padding token."""
        return self.of.pad_id

    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self.of


def _whole(checkpoint: Path, read: Callable[[], T]) -> T:
    """What `read` returns; damage, or other settings, become a UserError."""
    try:
        return read()
    except UserError:
        raise
    except (Damaged, ValueError) as error:
        raise UserError(f"{checkpoint}: {error}; take another with --step") from None
