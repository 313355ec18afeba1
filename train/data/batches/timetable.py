"""What each step reads, and what the first steps have read: all of it from the step's number alone, without state."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Literal

from train.data.batches.course import Course, Phase, Seen
from train.data.batches.lines import Lines
from train.data.batches.reader import Source
from train.data.config import VALIDATION_FRACTION


class Timetable:
    """The global batches of one split of one or several sources.

    Attributes:
        sources: that batches are drawn from.
        lines: of their sequences.
        phases: that a run goes through.
        steps_per_epoch: global batches of an epoch of a single source (all batches of a validation pass).
        num_tokens, num_documents: of the split, in all sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        split: Literal["train", "validation"],
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        validation_fraction: float = VALIDATION_FRACTION,
        skip: Sequence[range] = (),
        phases: Sequence[Phase] = (),
        best_fit: bool = False,
        shuffle_window: int | None = None,
    ) -> None:
        """Args: sources of one tokenizer; sizes in sequences; the seed of the order; which batches to pass over,
        ascending and apart: numbers from 0, as if none were; the phases, by default one with equal weights; whether
        documents of training are packed by best fit; tokens among which they are permuted, None for all.

        Raises:
            UserError: too little text for one batch of training.
        """
        self.sources, self.split, self.seed = sources, split, seed
        self.sequence_length, self.global_batch_size = sequence_length, global_batch_size
        self.validation_fraction = validation_fraction
        self._best_fit, self._shuffle_window, self._skip = best_fit, shuffle_window, skip
        self.phases = phases or [Phase(0, sequence_length, (1.0,) * len(sources))]
        self.lines = Lines(
            sources,
            self.phases,
            split=split,
            seed=seed,
            batch=global_batch_size,
            validation_fraction=validation_fraction,
            best_fit=best_fit,
            window=shuffle_window,
        )
        used = [self.lines.first(source) for source in range(len(sources))]
        self.num_documents = sum(reader.num_documents for reader in used)
        self.num_tokens = sum(reader.num_tokens for reader in used)
        self.steps_per_epoch = sum(reader.sequences for reader in used) // global_batch_size
        self.course = Course(self.phases, global_batch_size, lambda *key: self.lines.reader(*key).sequences)

    def batch_number(self, step: int) -> int:
        """The number of a step's batch in the order without `skip`, from 0."""
        number = step
        for skipped in self._skip:
            if number >= skipped.start:
                number += len(skipped)
        return number

    def length(self, step: int) -> int:
        """Tokens of a step's sequences."""
        return self.course.leg(self.batch_number(step)).length

    def epochs(self, steps: int) -> float:
        """Epochs that the first steps have begun, the last one in part; of a mixture, those of the source most read.

        What `skip` passes over counts as read.
        """
        return max(seen.epochs for seen in self._seen(steps))

    def seen(self, steps: int) -> dict[str, Seen]:
        """What the first steps have read of each source, by name; batches that were skipped count as read."""
        return {source.name: seen for source, seen in zip(self.sources, self._seen(steps), strict=True)}

    def _seen(self, steps: int) -> list[Seen]:
        return self.course.seen(self.batch_number(steps - 1) + 1 if steps else 0)

    def phase_starts(self, steps: int) -> list[int]:
        """The first step of each phase that begins within the first `steps`, the first phase's 0 included."""
        starts = [bisect_left(range(steps), phase.first, key=self.batch_number) for phase in self.phases]
        return [step for step in starts if step < steps]

    def where(self, step: int) -> dict[str, Any]:
        """What a step's batch is, JSON-able: its number from 1, epoch from 0, all ranks' sequences in that epoch.

        With several sources: the name, epoch and number of each sequence.
        """
        number = self.batch_number(step)
        leg = self.course.leg(number)
        source_B, line_B = self.course.locate(number, slice(0, self.global_batch_size))
        found = [self.lines.reader(source, leg.length).where(line_B[[place]]) for place, source in enumerate(source_B)]
        epochs, sequences = ([int(part[0]) for part in parts] for parts in zip(*found, strict=True))
        if len(self.sources) == 1:
            return {"batch": number + 1, "epoch": epochs[0], "sequences": sequences}
        names = [self.sources[source].name for source in source_B]
        return {"batch": number + 1, "sources": names, "epochs": epochs, "sequences": sequences}

    @property
    def shares(self) -> list[float]:
        """The sources' shares of the first phase; they sum to 1."""
        whole = self.course.legs[0].mixture.shares
        return [share / sum(whole) for share in whole]

    def identity(self) -> dict[str, Any]:
        """All that the global batches depend on, as a JSON object: two loaders with equal ones give equal batches.

        Ranks, micro-batches and names are no part of it.
        """
        later = [
            {"after_steps": leg.first, "sequence_length": leg.length, **self._mixed(leg.mixture.shares)}
            for leg in self.course.legs[1:]
        ]
        return {
            **self._mixed(self.course.legs[0].mixture.shares),
            "split": self.split,
            "validation_fraction": self.validation_fraction,
            "sequence_length": self.sequence_length,
            "global_batch_size": self.global_batch_size,
            "seed": self.seed,
            # Absent without any, as in what was saved before the key existed.
            **({"skip_steps": [[part.start + 1, part.stop] for part in self._skip]} if self._skip else {}),
            **({"phases": later} if later else {}),
            **({"packing": "best_fit"} if self._best_fit else {}),
            **({"shuffle_window": self._shuffle_window} if self._shuffle_window else {}),
        }

    def _mixed(self, shares: Sequence[int]) -> dict[str, Any]:
        mix = [[source.store.fingerprint, share] for source, share in zip(self.sources, shares, strict=True) if share]
        return {"fingerprint": mix[0][0]} if len(mix) == 1 else {"mix": mix}
