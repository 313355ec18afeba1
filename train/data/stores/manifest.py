"""The manifest of a token store: what its files hold, and whether they are still what was prepared."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from train.errors import UserError

MANIFEST = "manifest.json"

_LARGEST_ID = 2**31 - 1
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
TokenId = Annotated[int, Field(ge=0, le=_LARGEST_ID)]

Option = str | int | bool | None
"""Value of a preparation option in a manifest."""

_BLOCK = 64 * 1024
_BLOCKS = 64


class Manifest(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """What a prepared folder holds. The same text, tokenizer and options give the same manifest."""

    format: Literal["engram-token-store"] = "engram-token-store"
    """Marks the file for what it is."""
    version: Literal[1] = 1
    """Version of the folder's layout."""
    tokenizer: str
    """Name of the tokenizer; its file lies alongside."""
    tokenizer_sha256: str
    """Hash of the tokenizer's canonical JSON."""
    vocab_size: int = Field(ge=1, le=_LARGEST_ID + 1)
    """Largest token id of the tokenizer + 1."""
    eos_id: TokenId
    """Token that ends every document."""
    pad_id: TokenId
    """Padding token; equals `eos_id` where the tokenizer has none."""
    documents: Count
    """Documents in the store."""
    tokens: Count
    """Tokens in the store, end-of-document tokens included."""
    text_bytes: Count
    """UTF-8 bytes of all documents."""
    token_bytes: Count
    """The same, summed from the table of bytes per token: equal to `text_bytes` for byte-level tokenizers."""
    bad: Count
    """Source lines or files that were skipped because they could not be read."""
    passed_over: dict[str, Count] = {}
    """Entries of source folders that were not read, by what they are: endings, `hidden`, `broken links`, ..."""
    empty: Count
    """Documents that were skipped because they have no token."""
    sources: list[str]
    """What was prepared, as it was named."""
    options: dict[str, Option]
    """Choices that the contents depend on."""
    bin_sha256: str
    """Hash of the whole token file."""
    idx_sha256: str
    """Hash of the whole index file."""
    sample_sha256: str
    """Hash of sizes and of evenly spaced blocks of both files, verified at every opening."""
    shard_bytes: Count = 0
    """Bytes of the token file's pieces that have checksums of their own; 0 in older stores, which have none."""
    sums_sha256: str = ""
    """Hash of the file with these checksums."""
    fingerprint: str
    """Identity of the contents: tokens, document boundaries, tokenizer and end-of-document token."""

    @model_validator(mode="after")
    def _ids_are_of_the_vocabulary(self) -> Self:
        for name in ("eos_id", "pad_id"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is no id of a vocabulary of {self.vocab_size}")
        return self

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a prepared folder.

        Raises:
            UserError: missing, not a manifest, or edited by hand.
        """
        path = folder / MANIFEST
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror}); is {folder} a prepared token store?") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> "Manifest":
        """The manifest that a file has.

        Raises:
            UserError: it is none, or was edited by hand.
        """
        try:
            manifest = cls.model_validate(json.loads(content.decode()))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "top level"
            raise UserError(f"{path}: not a token store's manifest ({key}: {first['msg']}); prepare it again") from None
        except ValueError as error:
            raise UserError(f"{path}: not JSON ({error}); prepare it again") from None
        expected = fingerprint(
            manifest.bin_sha256, manifest.idx_sha256, manifest.tokenizer_sha256, manifest.vocab_size, manifest.eos_id
        )
        if manifest.fingerprint != expected:
            raise UserError(f"{path}: its fingerprint does not follow from its other entries; prepare it again")
        return manifest

    def to_json(self) -> str:
        """Text of `manifest.json`."""
        return self.model_dump_json(indent=2) + "\n"


def fingerprint(*parts: Any) -> str:
    """Hash of a sequence of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def sample_digest(*paths: Path) -> str:
    """Hash of the files' sizes and of at most 64 blocks of 64 KiB of each, first and last among them.

    Files up to 4 MiB are read whole. Cheap for any size, so that it can be verified at every opening; a change
    between the blocks of a larger file, of equal length, is left to `TokenStore.verify`.
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        last = max(0, size - _BLOCK)
        with path.open("rb") as stream:
            for block in range(_BLOCKS):
                stream.seek(last * block // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
