"""Sources: the files and folders that a corpus is made of, read as one stream of documents."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from train.data.preparation.readers import READERS, Bad, reader_of
from train.data.remote.files import AnyFile, RemoteFile, identity_of, is_url, remote_files
from train.data.stores.manifest import fingerprint
from train.errors import UserError

DOCUMENT_CHARS = 256 * 1024
_LEAST_DOCUMENTS = 32
_LEAST_DOCUMENT_CHARS = 1024
"""Plain text files above this length are cut into several documents."""

_BAD_SHOWN = 5


@dataclass(frozen=True)
class Place:
    """A place in the sources' documents."""

    file: int = 0
    """Number of a file."""
    documents: int = 0
    """Documents in the files before it."""
    bad: int = 0
    """Bad places in them."""
    passed: int = 0
    """Documents of the file itself that are before the place."""


@dataclass
class Report:
    """How far the reading is, and what was skipped."""

    bytes_read: int = 0
    """Bytes of the source files read so far, as they are on disk."""
    documents: int = 0
    """Documents given so far."""
    bad: int = 0
    """Places that gave no document."""
    first_bad: list[Bad] = field(default_factory=list)
    """The first few of them."""
    files: deque[Place] = field(default_factory=deque)
    """Where files begin, up to the one that is being read."""

    def place_of(self, documents: int) -> Place:
        """The place after the first documents; those of files that end before it are forgotten."""
        while len(self.files) > 1 and self.files[1].documents <= documents:
            self.files.popleft()
        begin = self.files[0]
        return replace(begin, passed=documents - begin.documents)

    def add_bad(self, bad: Bad) -> None:
        """Counts a bad place and keeps it if it is among the first."""
        self.bad += 1
        if len(self.first_bad) < _BAD_SHOWN:
            self.first_bad.append(bad)


Refuse = Callable[[str], str | None]
"""Why a document is passed over as a bad place; None for one that is not."""


def accept(text: str) -> None:
    """Passes nothing over."""


class Corpus(Protocol):
    """A stream of documents that can be read several times, always in the same order."""

    @property
    def names(self) -> list[str]:
        """What the documents come from, for the manifest."""

    @property
    def passed_over(self) -> dict[str, int]:
        """How many entries of folders are not read, by what they are."""

    @property
    def total_bytes(self) -> int:
        """Size of all files, to measure progress against."""

    @property
    def identity(self) -> str:
        """Changes whenever the documents may."""

    def documents(self, report: Report, begin: Place | None = None, refuse: Refuse = accept) -> Iterator[str]:
        """Reads from `begin`, or the start, keeping `report` up to date."""


class Sources:
    """Documents of files and folders.

    Folders are walked in sorted order, links followed. Hidden entries, files with other endings, and links that lead
    nowhere or to a folder that is read already are passed over, and counted. The order of documents depends only on the
    order of `paths` and the names of the files.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        *,
        text_key: str = "text",
        strict: bool = False,
        document_chars: int | None = None,
    ) -> None:
        """Args: files and folders, by path or URL; the field or column with the text; whether a bad place is fatal;
        where to cut.

        Plain text is cut after `document_chars`; None: 256 Ki characters, or a 32nd of little text, so that even one
        small file gives enough documents to hold some out for validation.

        Raises:
            UserError: a source is missing, of an unknown kind, a folder that cannot be listed, or one without any
                readable file.
        """
        if not paths:
            raise UserError("no source: name at least one file or folder of text")
        self.names = [_shown(path) for path in paths]
        self.text_key = text_key
        self.strict = strict
        passed_over: Counter[str] = Counter()
        self.files: list[AnyFile] = []
        for path in paths:
            self.files += _remote(str(path), passed_over) if is_url(path) else _files(Path(path), passed_over)
        self.passed_over = dict(sorted(passed_over.items()))
        self.total_bytes = sum(file.stat().st_size for file in self.files)
        few = max(_LEAST_DOCUMENT_CHARS, self.total_bytes // _LEAST_DOCUMENTS)
        self.document_chars = document_chars or min(DOCUMENT_CHARS, few)

    @property
    def identity(self) -> str:
        """Hash of what the documents depend on: options, and the files, with sizes and dates, where known."""
        files = [(str(file), *identity_of(file)) for file in self.files]
        return fingerprint(files, self.text_key, self.document_chars, self.strict)

    def documents(self, report: Report, begin: Place | None = None, refuse: Refuse = accept) -> Iterator[str]:
        """Every document from `begin`, or the first, keeping `report` up to date.

        The file that `begin` is in is read from its start. A document that `refuse` says something of is a bad place.

        Raises:
            UserError: with `strict`, at the first bad place.
        """
        begin = begin or Place()
        report.documents, report.bad = begin.documents, begin.bad
        done = sum(file.stat().st_size for file in self.files[: begin.file])
        for number, file in enumerate(self.files[begin.file :], begin.file):
            report.files.append(Place(number, report.documents, report.bad))
            reader = reader_of(file)
            assert reader is not None
            for record, position in reader(file, self.text_key, self.document_chars):
                report.bytes_read = done + position
                if isinstance(record, str) and (why := refuse(record)):
                    first = report.files[-1]
                    before = report.documents - first.documents + report.bad - first.bad
                    record = Bad(f"{file}, entry {before + 1:,}", why)
                if isinstance(record, str):
                    report.documents += 1
                    if report.documents > begin.documents + begin.passed:
                        yield record
                elif self.strict:
                    raise UserError(f"{record} (--strict: the first bad line ends the preparation)")
                else:
                    report.add_bad(record)
            done += file.stat().st_size
            report.bytes_read = done


def _remote(url: str, passed_over: Counter[str]) -> list[RemoteFile]:
    found = list(remote_files(url))
    files = [file for file in found if reader_of(file)]
    if not files:
        raise UserError(f"source {url}: no file there ends in {' '.join(READERS)}")
    for file in found:
        if not reader_of(file):
            passed_over[_shown(file.suffix.lower()) or "without an ending"] += 1
    return files


def _files(path: Path, passed_over: Counter[str]) -> list[Path]:
    known = " ".join(READERS)
    if path.is_file():
        if reader_of(path) is None:
            lines = "; if it holds a document a line, rename it to end in .jsonl" if path.suffix == ".json" else ""
            raise UserError(f"source {path}: unknown kind of file; known: {known}{lines}")
        return [path]
    if not path.is_dir():
        found = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise UserError(f"source {path}: {found}")
    files = list(_walk(path, passed_over))
    if not files:
        raise UserError(f"source {path}: no file in this folder ends in {known}{told(passed_over)}")
    return files


def _walk(root: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """The files of a folder, then those of its folders."""
    pending, walked = [root], set()
    while pending:
        folder = pending.pop()
        if (real := os.path.realpath(folder)) in walked:
            passed_over["folders read already"] += 1
            continue
        walked.add(real)
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            raise UserError(f"source {folder}: cannot be listed ({error.strerror})") from None
        inner = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
        pending += reversed(inner)
        for path in entries:
            if reason := _unread(path):
                passed_over[reason] += 1
            elif path.is_file():
                yield path


def _unread(path: Path) -> str | None:
    """The kind of a folder's entry that is passed over; None for one that is not."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return None
    if not path.is_file():
        return "broken links" if path.is_symlink() else "special files"
    return None if reader_of(path) else _shown(path.suffix.lower()) or "without an ending"


def told(passed_over: dict[str, int]) -> str:
    """How many entries were passed over, in words; empty for none."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in passed_over.items())
    return f" (passed over: {kinds})" if kinds else ""


def _shown(path: str | Path) -> str:
    """A name as text that can be printed and written; bytes that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode(errors="backslashreplace")
