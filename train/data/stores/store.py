"""A corpus as token ids on disk, memory-mapped."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from train.data.remote.files import is_url
from train.data.stores.elsewhere import RemoteStore
from train.data.stores.indexed import read_index
from train.data.stores.located import Elsewhere, located
from train.data.stores.manifest import Manifest, file_digest, fingerprint, sample_digest
from train.data.stores.shards import ShardedTokens, Tokens
from train.data.stores.sums import SUMS
from train.data.tokenization.tokenizer import TOKENIZER, TOKENIZER_CONFIG, Tokenizer
from train.errors import UserError

BIN = "tokens.bin"
IDX = "tokens.idx"
TOKEN_BYTES = "token_bytes.npy"
# Beside tokens and manifest, each with the manifest's entry of its hash; the tokenizer's is of its canonical form.
_SMALL = {IDX: "idx_sha256", SUMS: "sums_sha256", TOKEN_BYTES: "", TOKENIZER: "", TOKENIZER_CONFIG: ""}


class _Facts(NamedTuple):
    vocab_size: int
    eos_id: int
    pad_id: int
    tokenizer_sha256: str
    fingerprint: str
    bytes_ratio: float


class TokenStore:
    """Documents as one array of token ids with the documents' offsets in it. Opened by `TokenStore.open`.

    Attributes:
        tokens: uint16 or int32 [num_tokens], memory-mapped or by shards: all documents, one after another.
        document_offsets: int64 [num_documents + 1], document i is `tokens[document_offsets[i]:document_offsets[i+1]]`.
        token_bytes: int32 [vocab_size], UTF-8 bytes of text that each token stands for.
        vocab_size, eos_id, pad_id: of the tokenizer.
        tokenizer_sha256: the tokenizer's identity.
        fingerprint: identity of the contents.
        bytes_ratio: what the sum of `token_bytes` over the corpus is multiplied with to give its bytes of text.
        manifest: None for a plain Megatron pair.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        tokenizer: Tokenizer | None,
        token_bytes: np.ndarray,
        manifest: Manifest | None,
        facts: _Facts,
        remote: RemoteStore | None = None,
    ) -> None:
        """Use `open`."""
        self.prefix = prefix
        self.manifest = manifest
        self.token_bytes = token_bytes
        self.vocab_size, self.eos_id, self.pad_id = facts.vocab_size, facts.eos_id, facts.pad_id
        self.tokenizer_sha256, self.fingerprint = facts.tokenizer_sha256, facts.fingerprint
        self.bytes_ratio = facts.bytes_ratio
        self._tokenizer = tokenizer
        index_path = prefix.with_name(prefix.name + ".idx")
        index = read_index(index_path)
        try:
            self.document_offsets = index.document_offsets()
        except ValueError as error:
            raise UserError(f"{index_path}: cannot be used, {error}") from None
        count = int(self.document_offsets[-1])
        self.tokens: Tokens
        if remote is not None:
            self.tokens = remote.tokens(BIN, index.dtype, count)
        else:
            self.tokens = _map_tokens(prefix.with_name(prefix.name + ".bin"), index.dtype, count)

    @classmethod
    def open(
        cls, path: str | Path, *, tokenizer: Tokenizer | None = None, how: Elsewhere | None = None
    ) -> "TokenStore":
        """Opens a prepared folder, here or by URL, or a plain Megatron pair by its prefix or either file's name.

        Args:
            path: the folder, or the pair.
            tokenizer: needed for a plain pair; for a prepared folder it must be the one that made it.
            how: stores by URL are read.

        Raises:
            UserError: nothing there, files changed since they were prepared, another tokenizer, a damaged index, or a
                server that fails.
        """
        if is_url(path):
            return cls._open_prepared(RemoteStore(str(path), how or Elsewhere(), _SMALL), tokenizer)
        found = located(path)
        if found.is_dir():
            return cls._open_prepared(found, tokenizer)
        if tokenizer is None:
            raise UserError(
                f"{path}: a Megatron pair without manifest; name the tokenizer that made it (data.tokenizer)"
            )
        return cls._open_plain(found, tokenizer)

    @classmethod
    def _open_prepared(cls, place: Path | RemoteStore, tokenizer: Tokenizer | None) -> "TokenStore":
        remote = place if isinstance(place, RemoteStore) else None
        folder = place.folder if isinstance(place, RemoteStore) else place
        manifest = remote.manifest if remote else Manifest.read(folder)
        shown = remote.url if remote else folder
        if tokenizer is not None and tokenizer.sha256 != manifest.tokenizer_sha256:
            raise UserError(
                f"{shown}: made with the tokenizer {manifest.tokenizer}, which is not {tokenizer.name}; "
                f"drop data.tokenizer or prepare the text again"
            )
        try:
            # By URL, every shard is compared when it comes.
            unchanged = remote is not None or sample_digest(folder / BIN, folder / IDX) == manifest.sample_sha256
            token_bytes = np.load(folder / TOKEN_BYTES)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: damaged ({error}); prepare it again") from None
        if not unchanged:
            raise UserError(f"{folder}: {BIN} or {IDX} is not what its manifest describes; prepare it again")
        if token_bytes.shape != (manifest.vocab_size,):
            raise UserError(f"{folder}: {TOKEN_BYTES} does not fit the tokenizer in its manifest; prepare it again")
        facts = _Facts(
            manifest.vocab_size,
            manifest.eos_id,
            manifest.pad_id,
            manifest.tokenizer_sha256,
            manifest.fingerprint,
            manifest.text_bytes / max(1, manifest.token_bytes),
        )
        return cls(
            folder / "tokens",
            tokenizer=tokenizer,
            token_bytes=token_bytes,
            manifest=manifest,
            facts=facts,
            remote=remote,
        )

    @classmethod
    def _open_plain(cls, prefix: Path, tokenizer: Tokenizer) -> "TokenStore":
        files = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
        if not files[0].is_file():
            raise UserError(f"{files[0]}: missing beside its index")
        identity = fingerprint(sample_digest(*files), tokenizer.sha256, tokenizer.eos_id)
        facts = _Facts(tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.sha256, identity, 1.0)
        return cls(prefix, tokenizer=tokenizer, token_bytes=tokenizer.token_bytes(), manifest=None, facts=facts)

    @property
    def num_documents(self) -> int:
        """Documents in the store."""
        return len(self.document_offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the store."""
        return len(self.tokens)

    def bytes_of(self, tokens: np.ndarray) -> float:
        """UTF-8 bytes of text that token ids (any shape) stand for; negative ids do not count.

        Exact for byte-level tokenizers. Otherwise the table of bytes per token is scaled so that it is exact for the
        whole corpus, as the manifest has both sums.
        """
        return float(self.token_bytes[tokens[tokens >= 0]].sum(dtype=np.int64)) * self.bytes_ratio

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens, loaded on first use.

        Raises:
            UserError: `tokenizer.json` is missing or not the one in the manifest.
        """
        if self._tokenizer is None:
            path = self.prefix.with_name(TOKENIZER)
            loaded = Tokenizer.load(path)
            if loaded.sha256 != self.tokenizer_sha256:
                raise UserError(f"{path}: not the tokenizer in the manifest beside it; prepare the text again")
            self._tokenizer = loaded
        return self._tokenizer

    def check_ids(self, tokens: np.ndarray) -> None:
        """Raises UserError for token ids, of any shape, that are not the tokenizer's."""
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            bad = int(tokens.max() if tokens.min() >= 0 else tokens.min())
            raise UserError(
                f"{self.prefix}: token id {bad} is not in the tokenizer's {self.vocab_size} entries; was another "
                f"tokenizer used to make the tokens?"
            )

    def verify(self) -> None:
        """Reads both files completely and compares them with the manifest (opening compares samples only).

        Raises:
            UserError: they differ, or there is no manifest to compare with.
        """
        if self.manifest is None:
            raise UserError(f"{self.prefix}: a plain Megatron pair has no checksums to verify")
        expected = {BIN: self.manifest.bin_sha256, IDX: self.manifest.idx_sha256, SUMS: self.manifest.sums_sha256}
        if isinstance(self.tokens, ShardedTokens):
            self.tokens.check()
            del expected[BIN]
        for name, digest in expected.items():
            path = self.prefix.with_name(name)
            if digest and file_digest(path) != digest:
                raise UserError(f"{path}: damaged, its checksum is not the manifest's; prepare the text again")


def _map_tokens(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes, its index implies {count * dtype.itemsize}: truncated or damaged")
    if count == 0:
        raise UserError(f"{path}: no tokens")
    return np.memmap(path, dtype=dtype, mode="r")
