"""Readers: one file of text in, its documents and its bad places out.

A reader yields `(record, position)`: a document's text or a `Bad` place, and how many bytes of the file are read so
far. A file that cannot be read further ends with a `Bad`; no reader raises for what is in a file.
"""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from train.data.interruptible import interruptible
from train.data.preparation.compressed import decompressed, zstd_error
from train.data.remote.files import AnyFile

LONGEST_LINE = 256 << 20
"""The most bytes of a JSON line: a longer one is a bad place, so that a file without line ends neither fills the memory
nor blocks signals while it is parsed."""
_LINE_PIECE = 16 << 20
_PARQUET_BUFFER = 1 << 20
_ROWS, _ROWS_BYTES = 256, 16 << 20
"""The most rows of a Parquet file that are read at once, and about the most bytes of them."""


class Bad(NamedTuple):
    """A place in a source that gives no document."""

    where: str
    """`file`, or `file:line` counted from 1."""
    why: str
    """What is wrong there."""

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


Record = tuple[str | Bad, int]
Reader = Callable[[AnyFile, str, int], Iterator[Record]]


def read_text(path: AnyFile, text_key: str, document_chars: int) -> Iterator[Record]:
    """A plain text file in UTF-8: one document, or several where it is longer than `document_chars` characters.

    A long file is cut at the last line end (else space) before the limit: that bounds memory, and lets a corpus that
    is one file be split into training and validation documents.
    """
    try:
        size = path.stat().st_size
        # Decoded once before any of it is used: a file counts as bad or as good as a whole.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            while stream.read(document_chars):
                pass
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from ((piece, size) for piece in _pieces(stream, document_chars))
    except UnicodeDecodeError as error:
        yield Bad(str(path), f"not UTF-8 text ({error.reason})"), size
    except OSError as error:
        yield Bad(str(path), f"cannot be read ({error.strerror})"), 0


def _pieces(stream: io.TextIOWrapper, limit: int) -> Iterator[str]:
    rest = ""
    while block := stream.read(limit):
        rest += block
        while len(rest) > limit:
            cut = rest.rfind("\n", 0, limit) + 1 or rest.rfind(" ", 0, limit) + 1 or limit
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def read_jsonl(path: AnyFile, text_key: str, document_chars: int) -> Iterator[Record]:
    """JSON lines, perhaps compressed (`.gz`, `.zst`): a document a line, in the field `text_key`. Never cut."""
    number = 0
    try:
        with path.open("rb") as raw, decompressed(raw, path) as stream:
            for number, line in enumerate(_lines(stream), start=1):
                where = f"{path}:{number}"
                if line is None:
                    yield Bad(where, f"longer than {LONGEST_LINE >> 20} MiB; split it"), raw.tell()
                elif not line.isspace():
                    yield _or_bad(where, _json_text, line, text_key), raw.tell()
    except (OSError, EOFError, zlib.error, zstd_error()) as error:
        yield Bad(f"{path}:{number + 1}", f"cannot be read on ({error})"), 0


def _lines(stream: Any) -> Iterator[bytes | None]:
    """The lines of a binary stream; None for one that is too long."""
    # In pieces: between two of them a signal is handled, where one call would read to a line end however far it is.
    while piece := stream.readline(_LINE_PIECE):
        pieces, size = [piece], len(piece)
        while not piece.endswith(b"\n") and (piece := stream.readline(_LINE_PIECE)):
            size += len(piece)
            pieces = [*pieces, piece] if size <= LONGEST_LINE else []
        yield b"".join(pieces) if pieces else None


def _or_bad(where: str, parse: Callable[[Any, str], str], content: Any, text_key: str) -> str | Bad:
    try:
        return parse(content, text_key)
    except ValueError as error:
        return Bad(where, str(error))


def _json_text(content: bytes, text_key: str) -> str:
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise ValueError(f"a JSON {type(entry).__name__}, not an object")
    if text_key not in entry:
        keys = ", ".join(list(entry)[:5]) or "none"
        raise ValueError(f"no field {text_key!r} (its fields: {keys})")
    return _checked_text(entry[text_key], text_key)


def _checked_text(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{text_key!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as "\ud83d" in JSON
        raise ValueError(f"{text_key!r} is not valid Unicode") from None
    return text


def read_parquet(path: AnyFile, text_key: str, document_chars: int) -> Iterator[Record]:
    """Parquet: a document a row, in the column `text_key`. Never cut; rows count from 1."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        size = path.stat().st_size
        opened = path if isinstance(path, Path) else path.open("rb")
        with pyarrow.parquet.ParquetFile(opened, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as table:
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                yield Bad(str(path), f"no column {text_key!r} (its columns: {columns})"), size
                return
            rows = max(1, table.metadata.num_rows)
            batches = table.iter_batches(batch_size=_rows_at_once(table.metadata), columns=[text_key])
            while (batch := interruptible(lambda: next(batches, None))) is not None:
                for cell in batch.column(0):
                    row += 1
                    yield _or_bad(f"{path}:{row}", _cell_text, cell, text_key), size * row // rows
    # A damaged footer shows as any of them: a name that is not UTF-8, a size beyond all memory.
    except (OSError, ValueError, OverflowError, MemoryError, pyarrow.ArrowException) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        yield Bad(f"{path}:{row + 1}", f"cannot be read on ({why})"), 0


def _rows_at_once(metadata: Any) -> int:
    """Rows to read at a time, by the row group with the largest ones."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=0)
    return max(1, min(_ROWS, int(_ROWS_BYTES / max(1, largest))))


def _cell_text(cell: Any, text_key: str) -> str:
    try:
        content = cell.as_py()
    except UnicodeDecodeError as error:  # Arrow takes what a file calls text at its word
        raise ValueError(f"{text_key!r} is not UTF-8 ({error.reason})") from None
    except (ArithmeticError, TypeError, ValueError) as error:  # a date that Python has no number for
        raise ValueError(f"{text_key!r} is {cell.type}, not text ({error})") from None
    return _checked_text(content, text_key)


READERS: dict[str, Reader] = {
    **dict.fromkeys((".txt", ".md", ".py", ".rst"), read_text),
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"), read_jsonl),
    ".parquet": read_parquet,
}
"""The reader for each file name ending."""


def reader_of(path: AnyFile) -> Reader | None:
    """The reader for a file, told by its name; None for a name that tells nothing."""
    name = path.name.lower()
    return next((reader for suffix, reader in READERS.items() if name.endswith(suffix)), None)
