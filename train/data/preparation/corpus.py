"""The default corpus: the text that every machine has, Python's own standard library.

Documents are the library's sources (tests, other people's packages and generated code left out), its plain text
files, and each topic of the language reference that `pydoc` carries.
"""

import ast
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from train.data.preparation.prepare import build_store, train_bpe_on
from train.data.preparation.readers import Bad, read_text
from train.data.preparation.sources import DOCUMENT_CHARS, Place, Refuse, Report, accept
from train.data.stores.manifest import MANIFEST, Option, fingerprint
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.files import lock_file

_TOPICS = "pydoc_data/topics.py"
_SUFFIXES = (".py", ".txt", ".rst")
_SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "lib-dynload",
        "_bundled",
    )
)
# Written by programs: tables of numbers, not language.
_GENERATED = ("gencodec.py", "_sysconfigdata_", "msilib/schema.py", "msilib/sequence.py", "html/entities.py")
# Raised when the choice or the form of the documents changes, so that old caches are not used.
_EDITION = 1


class PythonCorpus:
    """Documents of the running Python's standard library, in sorted order."""

    def __init__(self, root: Path | None = None) -> None:
        """Args: folder of the library; None: of the running Python.

        Raises:
            UserError: there are no sources (some installations ship none).
        """
        self.root = root or Path(sysconfig.get_path("stdlib"))
        self.files = sorted(_files(self.root))
        if not self.files:
            raise UserError(f"{self.root}: no standard library sources; install them, or set data.path to your text")
        self.names = [f"Python {platform.python_version()} standard library"]
        self.passed_over: dict[str, int] = {}  # the choice of files is the corpus
        self.sizes = [(self.root / name).stat().st_size for name in self.files]
        self.total_bytes = sum(self.sizes)

    @property
    def identity(self) -> str:
        """Hash of the Python version and of the names and sizes of the files."""
        return fingerprint(_EDITION, platform.python_version(), self.files, self.sizes)

    def documents(self, report: Report, begin: Place | None = None, refuse: Refuse = accept) -> Iterator[str]:
        """Every document from `begin`, or the first, keeping `report` up to date; all of them are one file.

        None is of a size that `refuse` would tell of.
        """
        passed = begin.passed if begin else 0
        report.files.append(Place())
        for name, size in zip(self.files, self.sizes, strict=True):
            for record, _ in read_text(self.root / name, "", DOCUMENT_CHARS * 64):
                if isinstance(record, Bad):
                    report.add_bad(record)
                    continue
                for text in _topics(record) if name == _TOPICS else [record]:
                    if not _is_generated(text):
                        report.documents += 1
                        if report.documents > passed:
                            yield text
            report.bytes_read += size


def default_corpus(
    cache: str | Path,
    *,
    bpe_vocab: int,
    tokenizer: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Folder of the prepared default corpus, made on the first call for this Python, tokenizer and set of files.

    Safe to call from several processes at once: one prepares, the others wait.

    Args:
        cache: folder that holds the prepared folders.
        bpe_vocab: vocabulary of the byte-level BPE trained on the corpus, unless `tokenizer` (a name or file) is given.
        workers: tokenizing processes; None: one per core.
        progress: show progress on standard error.

    Raises:
        UserError: no standard library sources, an unusable tokenizer, no room on the disk.
    """
    corpus = PythonCorpus()
    loaded = Tokenizer.load(tokenizer) if tokenizer is not None else None
    key = fingerprint(corpus.identity, loaded.sha256 if loaded else bpe_vocab)[:12]
    out = Path(cache) / f"python-{platform.python_version()}-{key}"
    if (out / MANIFEST).is_file():
        return out
    options: dict[str, Option] = {"corpus": "python", "train_bpe": None if loaded else bpe_vocab}
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        with _alone(Path(cache), progress):
            if not (out / MANIFEST).is_file():
                build_store(
                    corpus,
                    out,
                    lambda shown: loaded or train_bpe_on(corpus, bpe_vocab, shown),
                    options=options,
                    workers=workers,
                    progress=progress,
                )
    except OSError as error:
        raise UserError(f"data.cache {cache}: cannot keep the default corpus there ({error.strerror})") from None
    return out


@contextmanager
def _alone(cache: Path, progress: bool) -> Iterator[None]:
    """Lets no other process prepare in the cache meanwhile; if one is at work there, waits for its end."""
    lock = lock_file(cache / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print(f"waiting for another process, which prepares the corpus in {cache}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _files(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            relative = Path(folder, name).relative_to(root).as_posix()
            if name.endswith(_SUFFIXES) and not any(part in relative for part in _GENERATED):
                yield relative


def _is_generated(text: str) -> bool:
    return any(part in text[:400] for part in _GENERATED)


def _topics(source: str) -> list[str]:
    """Texts of `pydoc_data/topics.py`: a dictionary literal of documentation pages."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign):
            pages = ast.literal_eval(node.value)
            return [pages[name] for name in sorted(pages)]
    return []
