"""The sources of a job's data section, opened, and the phases in which they are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from train.data.batches.course import Phase
from train.data.batches.reader import Source
from train.data.config import DataConfig, MixSource
from train.data.open import open_data
from train.data.phases import begun_at
from train.data.stores.examine import check
from train.data.stores.store import TokenStore
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError


@dataclass(frozen=True)
class Blend:
    """All sources of a run, and its phases.

    Attributes:
        sources: those of any phase, in the order in which they are named first.
        phases: with weights in that order.
    """

    sources: Sequence[Source]
    phases: Sequence[Phase]

    @property
    def store(self) -> TokenStore:
        """The first source's, which stands for all in what they have in common: tokenizer, vocabulary, padding."""
        return self.sources[0].store

    @classmethod
    def open(cls, data: DataConfig, batch: int, *, progress: bool = True) -> "Blend":
        """Opens what the job reads; `batch` is the number of sequences in a step.

        Raises:
            UserError: what `train.data.open.open_data` raises, sources of several tokenizers, or of one name.
        """
        if not data.mixes:
            sources = [Source("", open_data(data, progress=progress), 1.0)]
            phases = [Phase(first, length, (1.0,)) for first, length, _ in begun_at(data, batch)]
            return cls(sources, phases)
        named: dict[str, MixSource] = {}
        for mix in data.mixes:
            for source in mix:
                named.setdefault(source.path, source)
        sources = list(_opened(data, list(named.values())))
        weights = [
            tuple(sum(source.amount for source in mix if source.path == path) for path in named)
            for _, _, mix in begun_at(data, batch)
        ]
        phases = [Phase(*begin[:2], each) for begin, each in zip(begun_at(data, batch), weights, strict=True)]
        return cls(sources, phases)


def check_all(blend: Blend) -> Blend:
    """Reads all sources wholly (`train.data.stores.examine.check`). Raises UserError for one that is damaged."""
    for source in blend.sources:
        check(source.store)
    return blend


def _opened(data: DataConfig, wanted: Sequence[MixSource]) -> Iterator[Source]:
    tokenizer = None if data.tokenizer is None else Tokenizer.load(data.tokenizer)
    first: TokenStore | None = None
    paths: dict[str, str] = {}
    for source in wanted:
        store = TokenStore.open(source.path, tokenizer=tokenizer, how=data.elsewhere)
        first = first or store
        if _reading(store) != _reading(first):
            raise UserError(
                f"data.mix: {source.path} was prepared with another tokenizer than {wanted[0].path}; prepare it with "
                f"engram data prepare TEXT --out DIR --tokenizer {wanted[0].path}"
            )
        if (other := paths.setdefault(store.fingerprint, source.path)) != source.path:
            raise UserError(
                f"data.mix: {other} and {source.path} hold the same text, whose sequences would each come twice; name "
                f"one of them, with both weights added up"
            )
        yield Source(source.called, store, source.epochs)


def _reading(store: TokenStore) -> tuple[object, ...]:
    """What token ids mean."""
    return store.tokenizer_sha256, store.vocab_size, store.eos_id, store.pad_id
