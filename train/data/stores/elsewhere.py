"""Stores by URL: their small files are copied into the cache, their tokens fetched shard by shard."""

import hashlib
from typing import Any

import numpy as np

from train.data.remote.files import RemoteFile, file_system, is_http
from train.data.remote.retry import steadily
from train.data.stores.located import Elsewhere
from train.data.stores.manifest import MANIFEST, Manifest, fingerprint
from train.data.stores.shard_cache import ShardCache
from train.data.stores.shard_fetcher import ShardFetcher
from train.data.stores.shards import ShardedTokens
from train.data.stores.sums import SUMS, read_sums
from train.errors import UserError
from train.files import sync

_PIECE = 1 << 20


class RemoteStore:
    """A prepared store by URL.

    Attributes:
        folder: in the cache, with the store's files but for its tokens.
        manifest: of the store.
    """

    def __init__(self, url: str, how: Elsewhere, small: dict[str, str]) -> None:
        """Args: of the prepared folder; where it is cached; files beside tokens and manifest, each with the entry of
        the manifest that is its SHA-256, or nothing.

        Raises:
            UserError: nothing is there that can be read so, the server fails, or the cache has no room for its files.
        """
        self.url, self._how = url.rstrip("/"), how
        self._fs, self._path = file_system(self.url)
        text = self._file(MANIFEST).open("rb").read()
        self.manifest = Manifest.parse(text, f"{self.url}/{MANIFEST}")
        if not self.manifest.shard_bytes:
            raise UserError(
                f"{self.url}: was prepared before stores had checksums of shards; write it anew with engram data merge "
                f"STORE --out DIR, and upload that"
            )
        try:
            self._cache = ShardCache(how.folder, how.limit)
            name = fingerprint(self.manifest.fingerprint, self.manifest.shard_bytes)[:16]
            self.folder = how.folder / name
            with self._cache.alone(f".opening-{name}"):
                for file, entry in small.items():
                    if not (self.folder / file).is_file():
                        self._copy(file, getattr(self.manifest, entry) if entry else None)
                if not (self.folder / MANIFEST).is_file():
                    self._copy(MANIFEST, hashlib.sha256(text).hexdigest())
        except OSError as error:
            raise UserError(f"data.cache {how.folder}: cannot keep {self.url} there ({error.strerror})") from None

    def tokens(self, name: str, dtype: np.dtype, count: int) -> ShardedTokens:
        """The tokens of a file of the store, which has `count` of a type."""
        size, shard_bytes = count * dtype.itemsize, self.manifest.shard_bytes
        sums = read_sums(self.folder / SUMS, -(-size // shard_bytes))
        file = self._file(name)
        if file.stat().st_size != size:
            raise UserError(f"{file}: {file.stat().st_size} bytes, its index implies {size}: truncated or damaged")
        self._require_ranges(file)

        def bounds(shard: int) -> tuple[int, int]:
            return shard * shard_bytes, min(size, (shard + 1) * shard_bytes)

        def ask(begin: int, end: int) -> bytes:
            content: bytes = self._fs.cat_file(f"{self._path}/{name}", start=begin, end=end)
            return content

        fetcher = ShardFetcher(self._cache, self.folder.name, str(file), ask, sums, bounds, self._how.patience_s)
        return ShardedTokens(fetcher, dtype, count, shard_bytes // dtype.itemsize)

    def _file(self, name: str) -> RemoteFile:
        return RemoteFile(self._fs, f"{self._path}/{name}", f"{self.url}/{name}")

    def _copy(self, name: str, sha256: str | None) -> None:
        file, digest = self._file(name), hashlib.sha256()
        partial = self._cache.claim(f"{self.folder.name}/{name}.part", file.stat().st_size)
        with file.open("rb") as source, partial.open("r+b") as target:
            while piece := source.read(_PIECE):
                target.write(piece)
                digest.update(piece)
        if sha256 not in (None, digest.hexdigest()):
            raise UserError(f"{file}: is not what the manifest beside it describes; upload the store again")
        sync(partial)
        partial.replace(self.folder / name)

    def _require_ranges(self, file: RemoteFile) -> None:
        """Asks for the last byte. A server that knows no ranges would send the whole file for each shard."""
        if not is_http(self.url):
            return

        def ask() -> Any:
            with self._fs.open(f"{self._path}/{file.name}", "rb", block_size=1, cache_type="none") as stream:
                try:
                    stream.seek(file.stat().st_size - 1)
                    return stream.read(1)
                except ValueError:
                    raise UserError(
                        f"{file}: its server sends whole files only, where shards need byte ranges (HTTP 206); use one "
                        f"that has them"
                    ) from None

        steadily(str(file), ask)
