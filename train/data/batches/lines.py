"""The sources of a run's batches, each as an endless line of sequences, of every length that a phase has."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from train.data.batches.course import Phase
from train.data.batches.reader import Source, SplitReader
from train.data.batches.statistics import mixed_entropy, unigram_entropy
from train.errors import UserError


class Lines:
    """Readers of one split of several sources.

    Attributes:
        sources: by number.
        split: which documents.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        phases: Sequence[Phase],
        *,
        split: Literal["train", "validation"],
        seed: int,
        batch: int,
        validation_fraction: float,
        best_fit: bool,
        window: int | None,
    ) -> None:
        """Args: the sources; the phases that read them; the split; the seed of the order; sequences of a batch; the
        fraction held out; whether documents of training are packed by best fit; tokens among which they are permuted.

        Raises:
            UserError: too little text for one batch of training.
        """
        self.sources, self.split = sources, split
        self._phases, self._batch, self._best_fit, self._window = phases, batch, best_fit, window
        self._seed, self._validation_fraction = seed, validation_fraction
        # A source that a run begins with alone drops what does not fill a batch.
        self._alone = sum(weight > 0 for weight in phases[0].weights) == 1
        self._readers: dict[tuple[int, int], SplitReader] = {}
        for phase in phases:
            for source, weight in enumerate(phase.weights):
                if weight:
                    self._refuse_empty(source, self.reader(source, phase.length))

    def reader(self, source: int, length: int) -> SplitReader:
        """A source's sequences of a length."""
        if (source, length) not in self._readers:
            begins = self.split == "validation" or (self._alone and bool(self._phases[0].weights[source]))
            self._readers[source, length] = SplitReader(
                self.sources[source].store,
                split=self.split,
                length=length,
                seed=self._seed,
                validation_fraction=self._validation_fraction,
                whole=self._batch if begins else 1,
                best_fit=self._best_fit,
                window=self._window,
            )
        return self._readers[source, length]

    def first(self, source: int) -> SplitReader:
        """A source's sequences in the phase that it begins in."""
        lengths = (phase.length for phase in self._phases if phase.weights[source])
        return self.reader(source, next(lengths, self._phases[0].length))

    def padding(self) -> dict[str, float]:
        """The share of padding in an epoch of each source that is packed by best fit, in the phase that it begins."""
        firsts = {source.name: self.first(number) for number, source in enumerate(self.sources)}
        return {
            name: reader.fit.padding / (reader.fit.sequences * reader.length)
            for name, reader in firsts.items()
            if reader.fit is not None
        }

    def unigram_entropy(self, shares: Sequence[float], source: int, labels: np.ndarray | None) -> float:
        """Nats a token of `labels` under the frequencies of the sources' documents of training, mixed by `shares`.

        None stands for the whole validation split of `source`, which is then read.

        Raises:
            ValueError: there is no validation split.
        """
        stores = [each.store for each in self.sources]
        texts = [
            (store.tokens, store.document_offsets, self.first(number).held_out) for number, store in enumerate(stores)
        ]
        if len(texts) == 1:
            return unigram_entropy(*texts[0], stores[0].vocab_size, labels=labels)
        return mixed_entropy(texts, shares, stores[0].vocab_size, source=source, labels=labels)

    def _refuse_empty(self, source: int, reader: SplitReader) -> None:
        if self.split == "validation" or reader.sequences:
            return
        name = self.sources[source].name
        raise UserError(
            f"too little text{f' in {name}' if name else ''}: the training split has {reader.num_tokens:,} tokens in "
            f"{reader.num_documents:,} document(s), {reader.num_tokens // reader.length:,} sequences of "
            f"{reader.length}; {f'one step takes {self._batch}' if self._alone else 'it takes one'}. Add "
            f"text, shorten data.sequence_length or lower the batch size"
        )
