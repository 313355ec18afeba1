"""Preparation: text files in, a token store out."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from train.data.preparation.encode import LONGEST_PART, encode_stream, too_long, worker_count
from train.data.preparation.readers import Bad
from train.data.preparation.sources import Corpus, Report, Sources, told
from train.data.preparation.unfinished import UNFINISHED, Recorder, Unfinished
from train.data.preparation.writer import StoreWriter
from train.data.remote.hub import is_hub_name
from train.data.stores.manifest import MANIFEST, Manifest, Option, fingerprint
from train.data.stores.sample import sample_texts
from train.data.stores.sums import SHARD_BYTES
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.files import new_folder
from train.progress import Progress, duration

_BPE_SAMPLE_CHARS = 16_000_000


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Tokenizer | None = None,
    train_bpe: int | None = None,
    workers: int | None = None,
    text_key: str = "text",
    strict: bool = False,
    overwrite: bool = False,
    document_chars: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Turns text files and folders into a token store at `out`, which appears complete or not at all.

    Args:
        sources: files and folders: `.txt .md .py .rst .jsonl .jsonl.gz .jsonl.zst .json.gz .json.zst .parquet`.
        out: folder to make.
        tokenizer: a loaded one, or a name as of `Tokenizer.load`. This or `train_bpe`.
        train_bpe: vocabulary of a byte-level BPE to train on (a sample of) the same text.
        workers: tokenizing processes; None: one per core, fewer for little text; 1: none but this one.
        text_key: field or column that holds the text.
        strict: the first bad line or file is an error. Otherwise they are counted and the first few shown.
        overwrite: replace the token store at `out`; anything else stays.
        document_chars: plain text files longer than this become several documents; None: see `Sources`.
        progress: show a bar (on a terminal) or some lines on standard error.

    Raises:
        UserError: nothing to read, no document with text, no tokenizer, `out` in use or with a source in it, disk full.
    """
    corpus = Sources(sources, text_key=text_key, strict=strict, document_chars=document_chars)
    _require_apart(corpus, sources, out)
    if (tokenizer is None) == (train_bpe is None):
        raise UserError("prepare: give either a tokenizer (name or file) or the vocabulary of a BPE to train")
    options: dict[str, Option] = {
        "train_bpe": train_bpe,
        "text_key": text_key,
        "document_chars": corpus.document_chars,
    }

    def make_tokenizer(shown: Progress) -> Tokenizer:
        if train_bpe is not None:
            return train_bpe_on(corpus, train_bpe, shown)
        assert tokenizer is not None
        if isinstance(tokenizer, str) and is_hub_name(tokenizer):
            shown.line(f"asking the hub for the tokenizer {tokenizer}")
        return tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)

    return build_store(
        corpus, Path(out), make_tokenizer, options=options, workers=workers, overwrite=overwrite, progress=progress
    )


def _require_apart(corpus: Sources, sources: Sequence[str | Path], out: str | Path) -> None:
    """Refuses a folder to make that has a source in it, and names that are empty and so mean the folder one is in."""
    if not all(map(os.fspath, (*sources, out))):
        raise UserError("prepare: a source or the folder to make has an empty name; a dot is the folder you are in")
    place = f"{os.path.realpath(out)}{os.sep}"
    local = [file for file in corpus.files if isinstance(file, Path)]
    if inside := [file for file in local if os.path.realpath(file).startswith(place)]:
        raise UserError(f"{out}: holds the source {inside[0]}; choose another folder")


def train_bpe_on(corpus: Corpus, vocab_size: int, shown: Progress) -> Tokenizer:
    """A byte-level BPE trained on a deterministic sample (16 M characters) of a corpus.

    Raises:
        UserError: the vocabulary is too small, or the corpus has no text.
    """
    report = Report()

    def documents() -> Iterator[str]:
        for text in corpus.documents(report):
            percent = 100 * report.bytes_read // max(1, corpus.total_bytes)
            shown.show(report.bytes_read, f"reading a sample of the text: {percent} %")
            yield text

    texts = sample_texts(documents(), _BPE_SAMPLE_CHARS)
    if not any(texts):
        raise _nothing(corpus, report)
    chars = sum(map(len, texts)) / 1e6
    shown.line(f"training a byte-level BPE of {vocab_size:,} entries on {chars:,.1f} M characters of the text")
    tokenizer = Tokenizer.train_bpe(texts, vocab_size)
    if tokenizer.vocab_size < vocab_size:
        shown.line(f"the text gives a vocabulary of {tokenizer.vocab_size:,} entries only: no more pairs to merge")
    return tokenizer


def build_store(
    corpus: Corpus,
    out: Path,
    make_tokenizer: Callable[[Progress], Tokenizer],
    *,
    options: dict[str, Option],
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """`prepare` for any stream of documents. `options`: what the contents depend on, for the manifest.

    After a break it goes on where it was recorded last (`train.data.preparation.unfinished`), if text and options are
    the same.
    """
    key = fingerprint(corpus.identity, options, SHARD_BYTES, LONGEST_PART)

    def goes_on(folder: Path) -> bool:
        return Unfinished.read(folder, key) is not None

    try:
        with (
            Progress("tokenizing", corpus.total_bytes, active=progress) as shown,
            new_folder(out, overwrite=overwrite, like=MANIFEST, goes_on=goes_on) as folder,
        ):
            before = Unfinished.read(folder, key)
            # One that was trained on the text is not trained again.
            tokenizer = before.kept_tokenizer(folder) if before and options.get("train_bpe") else make_tokenizer(shown)
            if before and before.tokenizer_sha256 != tokenizer.sha256:
                before = None
            if before is None:
                (folder / UNFINISHED).unlink(missing_ok=True)  # what it describes is overwritten
            processes = worker_count(workers, corpus.total_bytes)
            try:
                return _fill(folder, corpus, tokenizer, processes, shown, options, key, before)
            except BaseException:
                if goes_on(folder):
                    shown.line(f"what is tokenized so far is kept beside {out}: the same command goes on from there")
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: no room on the disk for the token store ({error.strerror})") from None
        raise


def _fill(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    processes: int,
    shown: Progress,
    options: dict[str, Option],
    key: str,
    before: Unfinished | None,
) -> Manifest:
    report, started = Report(), time.monotonic()
    if before:
        report.first_bad = [Bad(*each) for each in before.first_bad]
        shown.line(f"going on after a break: {before.counts.documents:,} documents are tokenized already")
    shown.line(
        f"tokenizing {corpus.total_bytes / 1e6:,.1f} MB with {tokenizer.name}, {processes} process(es)"
        f"{told(corpus.passed_over)}"
    )
    records = Recorder(folder, key)
    texts = corpus.documents(report, before.place if before else None, lambda text: too_long(text, tokenizer))
    with (
        closing(encode_stream(tokenizer, texts, processes)) as chunks,
        StoreWriter(folder, tokenizer, before.counts if before else None) as writer,
    ):
        for chunk in chunks:
            writer.append(chunk)
            shown.show(
                report.bytes_read, _so_far(report, writer.counts.tokens, corpus.total_bytes, time.monotonic() - started)
            )
            records.offer(writer, report)
        if report.bad:
            places = "; ".join(map(str, report.first_bad))
            shown.line(f"{report.bad:,} bad line(s) or file(s) skipped; the first: {places}")
        if not writer.counts.tokens:
            raise _nothing(corpus, report)
        manifest = writer.finish(bad=report.bad, passed_over=corpus.passed_over, sources=corpus.names, options=options)
        records.end()
    rate = manifest.text_bytes / manifest.tokens
    shown.line(f"prepared {manifest.documents:,} documents, {manifest.tokens:,} tokens ({rate:.2f} bytes a token)")
    return manifest


def _so_far(report: Report, tokens: int, total_bytes: int, seconds: float) -> str:
    done, rate = report.bytes_read, max(1.0, report.bytes_read) / max(1e-9, seconds)
    return (
        f"tokenizing: {100 * done / max(1, total_bytes):.0f} %, {report.documents:,} documents, {tokens:,} tokens, "
        f"{rate / 1e6:.1f} MB/s, {duration(max(0, total_bytes - done) / rate)} left"
    )


def _nothing(corpus: Corpus, report: Report) -> UserError:
    names = ", ".join(corpus.names)
    if report.bad:
        return UserError(f"{names}: no document with text; {report.bad:,} bad, the first: {report.first_bad[0]}")
    return UserError(f"{names}: no document with text ({report.documents:,} empty ones)")
