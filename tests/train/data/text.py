"""Small texts, tokenizers and stores for the tests of this folder."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.data.stores.indexed import token_dtype, write_index
from train.data.stores.store import TokenStore
from train.data.tokenization.tokenizer import Tokenizer

SENTENCES = [f"Document {i}: the {w} jumps over {i % 7} lazy dogs.\n" * (1 + i % 5) for i, w in enumerate(["fox"] * 60)]


def small_tokenizer(vocab_size: int = 300) -> Tokenizer:
    return Tokenizer.train_bpe(SENTENCES, vocab_size)


@functools.cache
def deepseek() -> Tokenizer:
    """Loaded once: it takes a second."""
    return Tokenizer.load("deepseek")


def write_pair(prefix: Path, documents: Sequence[Sequence[int]], vocab_size: int = 300) -> Path:
    """A plain Megatron pair of the given documents."""
    dtype = token_dtype(vocab_size)
    np.concatenate([np.asarray(d, dtype=dtype) for d in documents]).tofile(f"{prefix}.bin")
    with Path(f"{prefix}.idx").open("wb") as stream:
        write_index(stream, dtype, np.array([len(d) for d in documents], dtype=np.int32))
    return prefix


def numbered_store(folder: Path, lengths: Sequence[int], tokenizer: Tokenizer) -> TokenStore:
    """Documents of the given lengths whose tokens run through 2..vocabulary-1; each non-empty one ends with eos."""
    documents, token = [], 2
    for length in lengths:
        body = [(token + i - 2) % (tokenizer.vocab_size - 2) + 2 for i in range(max(0, length - 1))]
        token += len(body)
        documents.append([*body, tokenizer.eos_id][:length] if length else [])
    return TokenStore.open(write_pair(folder / "numbered", documents, tokenizer.vocab_size), tokenizer=tokenizer)


def document(store, number):
    """Token ids of a document of a store."""
    return store.tokens[store.document_offsets[number] : store.document_offsets[number + 1]]
