"""Joins the model's Engram config, the data's tokenizer and the tables: which rows there are, and where they live."""

from collections.abc import Callable
from typing import Protocol

import torch

from model.config import EngramConfig, ModelConfig
from offload.addresses.compression import CompressedVocabulary, compress_tokenizer, identity_vocabulary
from offload.addresses.hashing import AddressBook
from offload.errors import Unavailable
from offload.rows.records import RecordLayout, RowInit
from offload.tables import EngramTables
from train.config.job import JobConfig
from train.data.batches.loader import Loader
from train.data.tokenization.tokenizer import Tokenizer
from train.errors import UserError
from train.ranks import host_group


class TokenSource(Protocol):
    """What addresses are made for: a token store, or anything else that knows its tokenizer."""

    @property
    def pad_id(self) -> int:
        """Padding token."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the tokens."""


def address_book(model: ModelConfig, source: TokenSource) -> AddressBook | None:
    """The addresses of a model's tables for the tokens of a source; None for a model without Engram.

    Raises:
        UserError: `model.engram.pad_id` is not a token.
    """
    engram = model.engram
    if engram is None:
        return None
    try:
        return addresses_of(engram, compressed_vocabulary(model, source))
    except ValueError as error:
        raise UserError(f"model.engram: {error}") from None


def addresses_of(engram: EngramConfig, vocabulary: CompressedVocabulary) -> AddressBook:
    """The addresses of the tables for tokens of a vocabulary."""
    return AddressBook(
        vocabulary,
        layers=engram.layers,
        orders=engram.orders,
        heads=engram.heads,
        rows_per_head=engram.rows_per_head,
        seed=engram.seed,
        cross_documents=engram.cross_documents,
    )


def table_bytes(job: JobConfig, addresses: AddressBook | None, device: torch.device | None = None) -> int:
    """Bytes of all tables' records, optimizer state included, if every row were touched.

    Args:
        job: the job.
        addresses: of its rows; None without Engram.
        device: of the model: counts the memory that its records take, padding included. None for their bytes in files.
    """
    if addresses is None or job.model.engram is None:
        return 0
    layout = RecordLayout.of(job.model.engram.row_dim, job.offload.optimizer, job.offload.row_dtype)
    nbytes = layout.bytes if device is None else layout.stride_bytes(device)
    return sum(addresses.num_rows(module) for module in range(addresses.num_modules)) * nbytes


def open_tables(
    job: JobConfig,
    addresses: AddressBook | None,
    loader: Loader,
    device: torch.device,
    tell: Callable[[str], None] = lambda text: None,
) -> EngramTables | None:
    """This rank's shard of the tables, looking ahead in the loader's batches; None without Engram. Collective.

    `tell` is told what takes long.

    Raises:
        UserError: host memory does not suffice or cannot be pinned, or the device lacks the requested engine.
    """
    if addresses is None or job.model.engram is None:
        return None
    # The planner's collectives run on a thread of their own, so they need a group of their own.
    group = host_group(job.launch.timeout_s)
    try:
        return EngramTables(
            job.offload,
            addresses,
            dim=job.model.engram.row_dim,
            init=RowInit(job.train.seed, job.model.engram.init_std),
            batches=loader.batch,
            num_steps=job.train.steps,
            host_group=group,
            device=device,
            tell=tell,
        )
    except Unavailable as error:
        raise UserError(str(error)) from None


def compressed_vocabulary(model: ModelConfig, source: TokenSource) -> CompressedVocabulary:
    """The ids that the hash sees, for a model with Engram.

    Raises:
        ValueError: `model.engram.pad_id` is not a token.
    """
    assert model.engram is not None
    pad_id = source.pad_id if model.engram.pad_id is None else model.engram.pad_id
    if not model.engram.compress_tokens:
        return identity_vocabulary(model.vocab_size, pad_id=pad_id)
    return compress_tokenizer(source.tokenizer().backend, pad_id=pad_id, vocabulary_size=model.vocab_size)
