"""What a checkpoint says about itself: `manifest.json`, written last, without which its folder is not a checkpoint."""

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from train.checkpoint.checked import Damaged, checked_text, read_checked
from train.checkpoint.index import Written
from train.checkpoint.tensor_files import DTYPES
from train.errors import UserError
from train.optim.pieces import TensorInfo

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 4
"""2 was the first with a manifest, 3 an increment; 4 is either, with the rows' update counts."""


@dataclass(frozen=True)
class Base:
    """The full save that an increment adds to: its step, and the checksum of its manifest."""

    step: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """See the attributes.

    Attributes:
        step: steps that were done.
        steps_applied: those of them that were not skipped, with those of the checkpoint that the run began with.
        nonce: of the save, also in every file's header.
        world_size: ranks that wrote it.
        skipped_in_a_row: skipped steps right before it.
        ephemeral: whether it is removed as soon as there is a newer good one.
        model, addresses, data, tokenizer: see `train.checkpoint.identity.Identity`.
        data_changes: deliberate changes of the data that the run has seen, oldest first: `step` and `change`.
        tables: state of the rows' optimizer; None without Engram.
        tensors: of the backbone, by name: dtype, as safetensors calls it, and shape.
        ranks: what each rank wrote.
        unevaluated: whether the evaluation after it was cut short by a signal, and is still to be made.
        tokens: trained on since the start of the run; None where that was not saved, see `tokens_seen`.
        recent: loss and gradient norm of the last updates, where steps are compared with them.
        config: the run's resolved config.
        versions: of the programs that wrote it.
        saved_at: time, UTC, ISO 8601.
        nodes: where each node keeps its ranks' parts: by rank, the name of its host; else empty.
        base: the full save that has all rows but those updated since, which are here; None for a full save.
    """

    step: int
    steps_applied: int
    nonce: str
    world_size: int
    skipped_in_a_row: int
    model: dict[str, Any]
    addresses: dict[str, Any] | None
    data: dict[str, Any]
    tokenizer: str | None
    data_changes: list[dict[str, Any]]
    tables: dict[str, Any] | None
    tensors: dict[str, tuple[str, list[int]]]
    ranks: list[Written]
    recent: list[tuple[float, float]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    saved_at: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    ephemeral: bool = False
    unevaluated: bool = False
    tokens: int | None = None
    nodes: list[str] = field(default_factory=list)
    base: Base | None = None
    format: int = FORMAT_VERSION

    @property
    def good(self) -> bool:
        """Whether nothing speaks against continuing from here."""
        return self.skipped_in_a_row == 0

    @property
    def num_rows(self) -> int:
        """Rows of the tables that were written."""
        return sum(rank.rows for rank in self.ranks)

    def tokens_seen(self, job: dict[str, Any]) -> int:
        """Tokens trained on; where that was not saved, as if all batches had had the size of the last one's.

        Args:
            job: a resolved config, which counts where none was saved either.
        """
        if self.tokens is not None:
            return self.tokens
        config = self.config or job
        return self.step * config["train"]["global_batch_size"] * config["data"]["sequence_length"]

    def infos(self) -> dict[str, TensorInfo]:
        """The tensors of the backbone; see `train.optim.pieces.StatePiece` for their names."""
        return {name: TensorInfo(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in self.tensors.items()}

    @classmethod
    def read(cls, folder: Path, read: Callable[[Path], bytes] = Path.read_bytes) -> tuple[Self, str]:
        """The manifest of a checkpoint, and its checksum. `read` gives a file's bytes.

        Raises:
            Damaged: it is missing, cannot be read, or any byte of it differs.
            UserError: it is of a later format.
        """
        values, found = read_checked(folder / MANIFEST_FILE, read)
        if values.get("format") not in range(2, FORMAT_VERSION + 1):
            raise UserError(f"{folder}: has format {values.get('format')}, this version reads 1 to {FORMAT_VERSION}")
        try:
            ranks = [Written(**entry) for entry in values.pop("ranks")]
            base = Base(**values.pop("base")) if "base" in values or values["format"] == 3 else None
            return cls(**values, ranks=ranks, base=base), found
        except (KeyError, TypeError) as error:
            raise Damaged(f"{MANIFEST_FILE} is none of this format ({error!r})") from None

    def text(self) -> bytes:
        """The manifest as a file."""
        values = asdict(self)
        if self.base is None:
            del values["base"]
        # Absent as they were before there were such checkpoints.
        for key in ("nodes", "ephemeral", "unevaluated"):
            if not values[key]:
                del values[key]
        return checked_text(values)[0]
