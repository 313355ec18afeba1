"""Parallel tokenization: texts in, chunks of token ids out, in the order of the texts."""

import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing import active_children, connection, current_process, get_context, parent_process
from typing import NamedTuple

import numpy as np

from offload.host.cores import usable_cores
from train.data.interruptible import interruptible
from train.data.stores.indexed import token_dtype
from train.data.tokenization.cuts import Part, longest_part, parts
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError

_CHUNK_CHARS = 1 << 19
"""Characters that are tokenized at a time. A longer document is cut, if that leaves its tokens as they are."""
LONGEST_PART = 16 << 20
"""The most characters of a document in which there is no place for a cut: each takes some 120 bytes of memory."""
_CHUNK_TEXTS = 8192
_TO_ONE_PROCESS = {signal.SIGTERM, signal.SIGHUP}
# Starting a process costs about as much as tokenizing this much text.
_BYTES_WORTH_A_PROCESS = 2 << 20


class Chunk(NamedTuple):
    """Consecutive tokenized documents, each closed by the end-of-document token; those without tokens are left out."""

    tokens: np.ndarray
    """uint16 or int32 (`token_dtype`): all documents, one after another."""
    lengths: np.ndarray
    """int32: tokens of each document, its end-of-document token included."""
    empty: int
    """Documents left out."""
    text_bytes: int
    """UTF-8 bytes of the documents."""


Batch = list[str] | Part
"""What is tokenized at a time: documents, or a part of one."""


def texts_of(batch: Batch) -> list[str]:
    """The texts of a batch."""
    return [batch.text] if isinstance(batch, Part) else batch


def encode_chunk(tokenizer: Tokenizer, batch: Batch) -> Chunk:
    """Tokenizes documents in this process, or a part of one, which then counts as a document."""
    texts = texts_of(batch)
    going_on = isinstance(batch, Part) and not batch.first
    encoded = [ids for ids in tokenizer.encode_batch(texts, going_on=going_on) if ids]
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), dtype=np.int32, count=len(encoded))
    tokens = np.empty(int(lengths.sum()), dtype=token_dtype(tokenizer.vocab_size))
    end = 0
    for ids in encoded:
        tokens[end : end + len(ids)] = ids
        end += len(ids) + 1
        tokens[end - 1] = tokenizer.eos_id
    text_bytes = sum(len(text.encode()) for text in texts)
    return Chunk(tokens, lengths, len(texts) - len(encoded), text_bytes)


def worker_count(wanted: int | None, total_bytes: int) -> int:
    """Processes to use: `wanted`, or as many as cores and the amount of text justify.

    A daemonic process may not have children: it tokenizes by itself.
    """
    if current_process().daemon:
        return 1
    if wanted is not None:
        return wanted
    return max(1, min(usable_cores(), total_bytes // _BYTES_WORTH_A_PROCESS))


def encode_stream(tokenizer: Tokenizer, texts: Iterable[str], workers: int) -> Generator[Chunk, None, None]:
    """Tokenizes a stream of documents with `workers` processes; the result does not depend on their number.

    With 1, this process does it by itself, on all cores as far as the library's own threads reach. At most two chunks
    per worker (about 0.5 M characters each, or a document that may not be cut) are held at a time, and the tokens of
    one document. Close it to end the processes before their work is done.

    Raises:
        UserError: a process was killed.
    """
    parts_before: list[Chunk] = []
    with closing(_encoded(tokenizer, batches_of(texts, tokenizer), workers)) as encoded:
        for batch, chunk in encoded:
            if not isinstance(batch, Part):
                yield chunk
                continue
            parts_before.append(chunk)
            if batch.last:
                yield _joined(parts_before)
                parts_before = []


def _joined(parts: list[Chunk]) -> Chunk:
    """The chunk of a document of which each part was taken for one."""
    some = [chunk.tokens for chunk in parts if len(chunk.tokens)]
    # Each ends with an end of document.
    tokens = np.concatenate([*(each[:-1] for each in some[:-1]), *(some[-1:] or [parts[0].tokens])])
    lengths = np.array([len(tokens)] if some else [], dtype=np.int32)
    return Chunk(tokens, lengths, empty=int(not some), text_bytes=sum(chunk.text_bytes for chunk in parts))


def _encoded(
    tokenizer: Tokenizer, batches: Iterable[Batch], workers: int
) -> Generator[tuple[Batch, Chunk], None, None]:
    """Each batch with its chunk, in order."""
    if workers == 1:
        for batch in batches:
            yield batch, interruptible(lambda batch=batch: encode_chunk(tokenizer, batch))  # type: ignore[misc]
        return
    # Spawned, not forked: the caller may have threads (torch, the tokenizers library).
    others = {*active_children()}
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), _start_worker, (tokenizer.json, tokenizer.specials["eos_token"])
    )
    try:
        pending: deque[tuple[Batch, Future[Chunk]]] = deque()
        for batch in batches:
            with _signals_held():
                pending.append((batch, pool.submit(_encode_in_worker, batch)))
            if len(pending) > 2 * workers:
                yield _first(pending)
        while pending:
            yield _first(pending)
    except BrokenProcessPool:
        raise UserError("a tokenizing process was killed (out of memory?); try fewer workers") from None
    except BaseException:
        # The work that they already have would take them seconds.
        for worker in {*active_children()} - others:
            worker.kill()
        # Who was killed while it sent a result leaves the pool waiting for the rest, as long as the pipe has a writer.
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _first(pending: deque[tuple[Batch, Future[Chunk]]]) -> tuple[Batch, Chunk]:
    batch, chunk = pending.popleft()
    return batch, chunk.result()


def batches_of(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[Batch]:
    """Documents in the batches that are tokenized at a time; long ones in parts, where their tokens allow it."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if len(text) > _CHUNK_CHARS and tokenizer.may_cut:
            if batch:
                yield batch
            yield from parts(text, tokenizer.may_cut, _CHUNK_CHARS)
            batch, chars = [], 0
            continue
        batch.append(text)
        chars += len(text)
        if chars >= _CHUNK_CHARS or len(batch) >= _CHUNK_TEXTS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def too_long(text: str, tokenizer: Tokenizer) -> str | None:
    """Why a document is not tokenized: it would take too much memory; None for one that is."""
    if len(text) <= LONGEST_PART or longest_part(text, tokenizer.may_cut, _CHUNK_CHARS) <= LONGEST_PART:
        return None
    where = "this tokenizer needs texts whole" if tokenizer.may_cut is None else "this tokenizer can cut it nowhere"
    return f"{len(text):,} characters, and {where}: at most {LONGEST_PART:,} are possible; split it"


_tokenizer: Tokenizer


@contextmanager
def _signals_held() -> Iterator[None]:
    """Starting a process here is not interrupted, nor are the imports of that process, which inherits the mask."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *_TO_ONE_PROCESS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(source: str, eos: str) -> None:
    global _tokenizer
    # Not SIGINT, which a terminal sends to all processes: it is the parent's to handle.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_ONE_PROCESS)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = Tokenizer(source, name="worker", eos=eos)


def _die_with_parent() -> None:
    # Siblings hold the queue's other end, so a killed parent would go unnoticed.
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: Batch) -> Chunk:
    return encode_chunk(_tokenizer, batch)
