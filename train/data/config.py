"""The `data` section of a job."""

import shlex
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from train.data.remote.files import is_url
from train.data.remote.hub import is_hub_name
from train.data.stores.located import SHARDS, Elsewhere
from train.data.tokenization.limits import LARGEST_BPE, SMALLEST_BPE

VALIDATION_FRACTION = 0.05


class MixSource(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """A source of a mixture."""

    path: str
    """Prepared token store, or a Megatron pair, as `data.path`."""
    weight: float | None = Field(None, gt=0)
    """Its share, in any unit: shares are the weights over their sum. All sources of a mixture have one, or all have
    `tokens`."""
    tokens: int | None = Field(None, ge=1)
    """Tokens that it is to give in proportion to the others': 3_000_000_000 beside 1_000_000_000 is a share of 0.75."""
    epochs: float = Field(4.0, gt=0)
    """Times that it may be repeated before the start warns of it. The default is how often text can be repeated at
    little loss (Muennighoff et al. 2023, arXiv 2305.16264)."""
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    """Its name in metrics and messages; null: the last part of its path."""

    @property
    def called(self) -> str:
        """`name`, or what stands for it."""
        return self.name or Path(self.path).name

    @property
    def amount(self) -> float:
        """`weight` or `tokens`."""
        return self.weight if self.weight is not None else float(self.tokens or 0)

    @model_validator(mode="after")
    def _says_how_much(self) -> "MixSource":
        if (self.weight is None) == (self.tokens is None):
            raise ValueError(f"{self.path}: give it a weight, or tokens")
        return self


Mix = list[MixSource]


def parsed_mix(value: Any) -> Any:
    """Megatron's blend, `weight path weight path ...` in one text or a list, as the sources that it stands for."""
    words = shlex.split(value) if isinstance(value, str) else value
    if not isinstance(words, list) or not words or isinstance(words[0], dict):
        return value
    if len(words) % 2:
        raise ValueError(f"expected `weight path weight path ...`, got {len(words)} words")
    return [{"weight": _weight(weight), "path": path} for weight, path in zip(words[::2], words[1::2], strict=True)]


def _weight(word: Any) -> float:
    try:
        return float(word)
    except (TypeError, ValueError):
        raise ValueError(f"expected `weight path weight path ...`, got {word!r} in the place of a weight") from None


def _checked_mix(mix: Mix | None) -> Mix | None:
    if mix is not None:
        if not mix:
            raise ValueError("no source: name at least one, as {path: data/web, weight: 1}")
        if len({source.weight is None for source in mix}) > 1:
            raise ValueError("all sources of a mixture have a weight, or all have tokens")
        if len({source.path for source in mix}) < len(mix):
            raise ValueError("a path stands there twice: add up its weights")
    return mix


class PhaseConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """A later part of a run. What it does not set stays as it was."""

    after_steps: int | None = Field(None, ge=1)
    """Batches before it, those of `skip_steps` included. This or `after_tokens`."""
    after_tokens: int | None = Field(None, ge=1)
    """It begins with the first batch before which so many tokens were read."""
    mix: Mix | None = None
    """As `data.mix`."""
    sequence_length: int | None = Field(None, ge=2, le=10_000_000)
    """Tokens in a sequence. Batch sizes stay as they are, in sequences: a step then has more tokens."""

    parse_mix = field_validator("mix", mode="before")(parsed_mix)
    check_mix = field_validator("mix")(_checked_mix)

    @model_validator(mode="after")
    def _begins_and_changes(self) -> "PhaseConfig":
        if (self.after_steps is None) == (self.after_tokens is None):
            raise ValueError("a phase begins after_steps or after_tokens: give one of them")
        if self.mix is None and self.sequence_length is None:
            raise ValueError("a phase changes mix or sequence_length: give one of them, or both")
        return self


class DataConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What a job trains on, and how it is packed into sequences."""

    path: str | None = None
    """Prepared token store: a folder that `engram data prepare` made, here or by URL (`s3://`, `https://`, ...), or the
    prefix of a Megatron `.bin`/`.idx` pair (which needs `tokenizer`). null: the default corpus, which is the sources
    and documentation of the Python standard library, prepared on first run."""

    mix: Mix | None = None
    """Several sources of one tokenizer in the place of `path`: a list of mappings of `path` and `weight` (or `tokens`),
    or Megatron's form `0.7 data/web 0.3 data/code`. Each sequence comes from one source, in an order that keeps the
    shares at any time; see docs/data.md."""

    phases: list[PhaseConfig] = []
    """Other mixtures or sequence lengths later in the run. A run that is resumed may change those that have not begun;
    to change another one, set `allow_change`."""

    cache: str = "data"
    """Folder in which the default corpus is kept once prepared, and, in `shards`, what was fetched of stores by URL."""

    cache_bytes: int = Field(50_000_000_000, ge=1, le=2**62)
    """The most bytes of each machine's disk for what was fetched of stores by URL. Jobs that share the folder share it;
    what was used longest ago goes first."""

    fetch_ahead: int = Field(16, ge=0, le=100_000)
    """Steps whose text is fetched ahead from stores by URL, beyond those whose rows are; at most as fills half of
    `cache_bytes`."""

    patience_s: float = Field(600.0, ge=0, le=1_000_000_000)
    """Seconds for which a server with a store by URL may fail before the run ends. Keep it below `train.hang_s`."""

    bpe_vocab: int = Field(4096, ge=SMALLEST_BPE, le=LARGEST_BPE)
    """Vocabulary of the byte-level BPE trained on the default corpus, end-of-document and padding included.
    Not used when `path` or `tokenizer` is given."""

    tokenizer: str | None = None
    """`deepseek`, a `tokenizer.json` (or the folder that has one), or a hub's `owner/name` (`owner/name@revision`). For
    the default corpus: used instead of a BPE trained on the spot. With `path`: what its tokens were made with; a
    prepared folder already has its own, and any other is refused."""

    verify: bool = False
    """Read all of the text at the start and compare it with its manifest, as `engram data verify` does. Otherwise
    samples of it are compared."""

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

    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents of training come into sequences: laid end to end and cut wherever a sequence ends, or `best_fit`:
    side by side, none cut that fits into a sequence, the rest padding, whose share the start tells."""

    shuffle_window: int | None = Field(None, ge=1, le=2**62)
    """Tokens of a store among which an epoch's documents are shuffled: random parts of it, of 4,194,304 consecutive
    tokens each, one such window after another. null: all documents of the store. Set it for large stores by URL, which
    are then fetched once an epoch; the more tokens, the better mixed. Not with `packing: best_fit`."""

    validation_fraction: float = Field(VALIDATION_FRACTION, ge=0, le=0.5)
    """Fraction of documents held out for validation. 0: none, and no evaluation."""

    def anchored(self) -> Self:
        """The same with absolute paths, for whoever reads them in another folder."""
        own = self.tokenizer is not None and self.tokenizer != "deepseek" and not is_hub_name(self.tokenizer)
        paths = {"path": self.path, "cache": self.cache, "tokenizer": self.tokenizer if own else None}
        phases = [phase.model_copy(update={"mix": _anchored(phase.mix)}) for phase in self.phases]
        absolute = {name: _absolute(path) for name, path in paths.items() if path is not None}
        return self.model_copy(update={**absolute, "mix": _anchored(self.mix), "phases": phases})

    parse_mix = field_validator("mix", mode="before")(parsed_mix)
    check_mix = field_validator("mix")(_checked_mix)

    @property
    def first_mix(self) -> Mix:
        """The sources of the first phase; empty for a run without any mixture."""
        if self.mix or self.path is None or not any(phase.mix for phase in self.phases):
            return self.mix or []
        return [MixSource(path=self.path, weight=1.0)]

    @property
    def mixes(self) -> list[Mix]:
        """The mixtures of all phases that set one."""
        return [mix for mix in (self.first_mix, *(phase.mix for phase in self.phases)) if mix]

    @property
    def longest(self) -> int:
        """Tokens of a sequence in the phase where they are most."""
        return max(self.sequence_length, *(phase.sequence_length or 0 for phase in self.phases), 0)

    @property
    def elsewhere(self) -> Elsewhere:
        """How stores by URL are read."""
        return Elsewhere(Path(self.cache, SHARDS), self.cache_bytes, self.patience_s)

    @property
    def shown(self) -> str:
        """Where the text comes from, for people."""
        return self.path or ", ".join(source.path for source in self.mix or []) or "default corpus"

    @model_validator(mode="after")
    def _packs_within_windows(self) -> "DataConfig":
        if self.shuffle_window is not None and self.packing == "best_fit":
            raise ValueError(
                "shuffle_window and packing: best_fit exclude each other: best fit takes pieces from everywhere"
            )
        return self

    @model_validator(mode="after")
    def _has_one_source_of_text(self) -> "DataConfig":
        if self.mix and self.path is not None:
            raise ValueError("path and mix are both set: name the path as a source of the mixture, or drop one")
        if self.mixes and not self.first_mix:
            raise ValueError("phases have a mix, but the run begins without one: set path or mix")
        names: dict[str, str] = {}
        for source in (source for mix in self.mixes for source in mix):
            if (other := names.setdefault(source.called, source.path)) != source.path:
                raise ValueError(f"{source.path} and {other} are both called {source.called}: give one another name")
        return self

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


def _anchored(mix: Mix | None) -> Mix | None:
    return mix and [source.model_copy(update={"path": _absolute(source.path)}) for source in mix]


def _absolute(path: str) -> str:
    return path if is_url(path) else str(Path(path).absolute())
