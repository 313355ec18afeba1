"""Sources: the files and folders that a corpus is made of, read as one stream of documents."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from train.data.readers import READERS, Bad, reader_of
from train.errors import UserError

DOCUMENT_CHARS = 256 * 1024
_LEAST_DOCUMENTS = 32
_LEAST_DOCUMENT_CHARS = 1024
"""Plain text files above this length are cut into several documents."""

_BAD_SHOWN = 5


@dataclass
class Report:
    """How far the reading is, and what was skipped."""

    bytes_read: int = 0
    """Bytes of the source files read so far, as they lie on disk."""
    documents: int = 0
    """Documents given so far."""
    bad: int = 0
    """Places that gave no document."""
    first_bad: list[Bad] = field(default_factory=list)
    """The first few of them."""

    def add_bad(self, bad: Bad) -> None:
        """Counts a bad place and keeps it if it is among the first."""
        self.bad += 1
        if len(self.first_bad) < _BAD_SHOWN:
            self.first_bad.append(bad)


class Corpus(Protocol):
    """A stream of documents that can be read several times, always in the same order."""

    @property
    def names(self) -> list[str]:
        """What the documents come from, for the manifest."""

    @property
    def total_bytes(self) -> int:
        """Size of all files, to measure progress against."""

    def documents(self, report: Report) -> Iterator[str]:
        """Reads from the start, keeping `report` up to date."""


class Sources:
    """Documents of files and folders.

    Folders are walked in sorted order; hidden entries and files whose names end otherwise are passed over. The order
    of documents depends on nothing but the order of `paths` and the names of the files.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        text_key: str = "text",
        strict: bool = False,
        document_chars: int | None = None,
    ) -> None:
        """Args: files and folders; the field or column with the text; whether a bad place is fatal; where to cut.

        Plain text is cut after `document_chars`; None: 256 Ki characters, or a 32nd of little text, so that even one
        small file gives documents enough to hold some out for validation.

        Raises:
            UserError: a source is missing, of an unknown kind, or a folder without any readable file.
        """
        if not paths:
            raise UserError("no source: name at least one file or folder of text")
        self.names = [str(path) for path in paths]
        self.text_key = text_key
        self.strict = strict
        self.files = [file for path in paths for file in _files(Path(path))]
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        few = max(_LEAST_DOCUMENT_CHARS, self.total_bytes // _LEAST_DOCUMENTS)
        self.document_chars = document_chars or min(DOCUMENT_CHARS, few)

    def documents(self, report: Report) -> Iterator[str]:
        """Every document from the first, keeping `report` up to date.

        Raises:
            UserError: with `strict`, at the first bad place.
        """
        done = 0
        for file in self.files:
            reader = reader_of(file)
            assert reader is not None
            for record, position in reader(file, self.text_key, self.document_chars):
                report.bytes_read = done + position
                if isinstance(record, str):
                    report.documents += 1
                    yield record
                elif self.strict:
                    raise UserError(f"{record} (--strict: the first bad line ends the preparation)")
                else:
                    report.add_bad(record)
            done += file.stat().st_size
            report.bytes_read = done


def _files(path: Path) -> list[Path]:
    known = " ".join(READERS)
    if path.is_file():
        if reader_of(path) is None:
            raise UserError(f"source {path}: unknown kind of file; known: {known}")
        return [path]
    if not path.is_dir():
        raise UserError(f"source {path}: no such file or folder")
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        visible = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        found += [file for file in visible if reader_of(file) is not None and file.is_file()]
    if not found:
        raise UserError(f"source {path}: no file in this folder ends in {known}")
    return found
