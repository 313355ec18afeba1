"""The `data` section of a job."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, field_validator, model_validator

VALIDATION_FRACTION = 0.05
SMALLEST_BPE = 258
"""Vocabulary of a byte-level BPE without any merge: 256 bytes, end of document, padding."""

LARGEST_BPE = 10_000_000
"""Its training takes memory for each entry that is asked for, and ends the process if there is not enough."""


class DataConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What a job trains on, and how it is packed into sequences."""

    path: str | None = None
    """Prepared token store: a folder that `engram data prepare` made, or the prefix of a Megatron `.bin`/`.idx` pair
    (which needs `tokenizer`). null: the default corpus, which is the sources and documentation of the Python standard
    library, prepared on first run."""

    cache: str = "data"
    """Folder in which the default corpus is kept once prepared."""

    bpe_vocab: int = Field(4096, ge=SMALLEST_BPE, le=LARGEST_BPE)
    """Vocabulary of the byte-level BPE trained on the default corpus, end-of-document and padding included.
    Not used when `path` or `tokenizer` is given."""

    tokenizer: str | None = None
    """`deepseek`, or a `tokenizer.json` (or the folder that has one). For the default corpus: used instead of a BPE
    trained on the spot. With `path`: what its tokens were made with; a prepared folder already has its own, and
    any other is refused."""

    workers: int | None = Field(None, ge=1, le=1_024)
    """Processes that tokenize the default corpus. null: one per core, fewer for little text."""

    allow_change: bool = False
    """Let a run resume from a checkpoint that was saved with other data (other text with the same tokenizer, another
    sequence length or batch size). All later checkpoints record the change."""

    skip_steps: list[list[int]] = []
    """Batches to skip, as ranges `[first, last]` of the steps that would train on them if none were skipped; log.txt
    and skipped.jsonl name those of skipped steps. To resume from a checkpoint with other ranges, set `allow_change`."""

    sequence_length: int = Field(256, ge=2, le=10_000_000)
    """Tokens in one packed sequence (T)."""

    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, le=0.5)
    """Fraction of documents held out for validation. 0: none, and no evaluation."""

    def anchored(self) -> Self:
        """The same with absolute paths, for whoever reads them in another folder."""
        own = self.tokenizer is not None and self.tokenizer != "deepseek"
        paths = {"path": self.path, "cache": self.cache, "tokenizer": self.tokenizer if own else None}
        return self.model_copy(
            update={name: str(Path(path).absolute()) for name, path in paths.items() if path is not None}
        )

    @field_validator("skip_steps")
    @classmethod
    def _are_ranges(cls, ranges: list[list[int]]) -> list[list[int]]:
        last = 0
        for part in ranges:
            if len(part) != 2 or not last < part[0] <= part[1]:
                raise ValueError(
                    f"{part} is not a range [first, last] of steps, counted from 1 and after the ranges before it"
                )
            last = part[1]
        return ranges

    @model_validator(mode="before")
    @classmethod
    def _of_older_runs(cls, values: Any) -> Any:
        # Their saved configs name the one corpus that there is.
        if isinstance(values, dict) and values.get("corpus") == "python":
            return {key: value for key, value in values.items() if key != "corpus"}
        return values
