"""How far a preparation is, kept beside what it has written, so that a later one goes on after a break.

What is on the disk up to there is not made again. The file of text that was in work is read again from its start, and
what was tokenized of it passed over.
"""

import os
import time
from pathlib import Path

from pydantic import BaseModel, ValidationError

from train.data.preparation.sources import Place, Report
from train.data.preparation.writer import Counts, StoreWriter, is_written
from train.data.tokenization.tokenizer import TOKENIZER, Tokenizer

UNFINISHED = "unfinished.json"
EVERY_S = 30.0
"""Seconds between two records."""


class Unfinished(BaseModel, extra="forbid", frozen=True, strict=True):
    """A record.

    Attributes:
        key: what the contents depend on, the tokenizer left out.
        tokenizer, tokenizer_sha256: its name and identity.
        place: where to go on in the text.
        first_bad: the first bad places before `place`, each with where and why.
        counts: written so far.
    """

    key: str
    tokenizer: str
    tokenizer_sha256: str
    place: Place
    first_bad: list[tuple[str, str]]
    counts: Counts

    @classmethod
    def read(cls, folder: Path, key: str) -> "Unfinished | None":
        """The record in a folder; None without one, of other contents, or of more than is there."""
        try:
            found = cls.model_validate_json((folder / UNFINISHED).read_bytes())
        except (OSError, ValidationError):
            return None
        if found.key != key or not is_written(folder, found.counts):
            return None
        return found

    def kept_tokenizer(self, folder: Path) -> Tokenizer:
        """The tokenizer of what is written."""
        tokenizer = Tokenizer.load(folder)
        tokenizer.name = self.tokenizer
        return tokenizer

    def write(self, folder: Path) -> None:
        """Replaces the record in a folder."""
        partial = folder / f"{UNFINISHED}.part"
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(self.model_dump_json())
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(folder / UNFINISHED)


class Recorder:
    """Writes records now and then."""

    def __init__(self, folder: Path, key: str) -> None:
        """Args: of the store that is being written; as of `Unfinished`."""
        self._folder, self._key = folder, key
        self._due = time.monotonic() + EVERY_S

    def offer(self, writer: StoreWriter, report: Report) -> None:
        """Takes note, if it is time, of what was written and of how far the text is read."""
        if time.monotonic() < self._due:
            return
        tokenizer, counts = writer.tokenizer, writer.counts
        if not (self._folder / TOKENIZER).exists():
            tokenizer.save(self._folder)
        writer.sync()
        place = report.place_of(counts.documents + counts.empty)
        Unfinished(
            key=self._key,
            tokenizer=tokenizer.name,
            tokenizer_sha256=tokenizer.sha256,
            place=place,
            first_bad=[(each.where, each.why) for each in report.first_bad[: place.bad]],
            counts=counts,
        ).write(self._folder)
        self._due = time.monotonic() + EVERY_S

    def end(self) -> None:
        """Removes the record: the store is complete."""
        (self._folder / UNFINISHED).unlink(missing_ok=True)
