"""Files that lie elsewhere, by URL: read as they come, without a local copy, through whatever breaks in between.

`fsspec` knows the protocols, and needs a library for each: aiohttp for `https://`, s3fs for `s3://`; `hf://` comes with
huggingface_hub. Credentials and endpoints are those of these libraries (environment variables, their config files).
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from train.data.remote.retry import TRIES, steadily, wait_before_next
from train.errors import UserError

_BUFFER = 1 << 20
_STALL_S = 60.0
"""Without a byte, a connection counts as broken."""
_IDENTITY = ("size", "ETag", "LastModified", "last_modified", "mtime")


def is_url(name: object) -> bool:
    """Whether a source's name is a URL."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", str(name)) is not None


class RemoteFile:
    """A file by URL, with as much of a `Path` as readers use.

    Attributes:
        url: as it is shown.
        name, suffix: of its last part.
    """

    def __init__(self, fs: Any, path: str, url: str) -> None:
        """Args: the file system, the file's name in it and for people.

        Raises:
            UserError: it is not there, or the server does not answer.
        """
        self._fs, self._path, self.url = fs, path, url
        last = PurePosixPath(path.split("?")[0])
        self.name, self.suffix = last.name, last.suffix
        self._info = steadily(url, lambda: fs.info(path))
        if self._info.get("size") is None:
            raise UserError(f"source {url}: the server does not tell its size; download it, and give the file")

    def __str__(self) -> str:
        return self.url

    def stat(self) -> Any:
        """Its size, as `st_size`."""
        return SimpleNamespace(st_size=int(self._info["size"]))

    def open(self, mode: str = "r", encoding: str | None = None, newline: str | None = None) -> Any:
        """A stream from its start; binary ones can be sought in where the server has byte ranges.

        Raises:
            UserError: when it is read: the server fails again and again, or the file has changed meanwhile.
        """
        binary = io.BufferedReader(_Stream(self._fs, self._path, self.url, self._info), _BUFFER)
        return binary if "b" in mode else io.TextIOWrapper(binary, encoding=encoding, newline=newline)

    @property
    def identity(self) -> list[str]:
        """What is known of its version."""
        return [f"{key}={self._info[key]}" for key in _IDENTITY if self._info.get(key) is not None]


AnyFile = Path | RemoteFile


def identity_of(file: AnyFile) -> list[str]:
    """What tells a file's version from others of its name."""
    if isinstance(file, RemoteFile):
        return file.identity
    found = file.stat()
    return [str(found.st_size), str(found.st_mtime_ns)]


def remote_files(url: str) -> Iterator[RemoteFile]:
    """The file at a URL, or, of a folder, all files below it in sorted order, hidden ones left out.

    Raises:
        UserError: nothing is there, the library of its protocol is not installed, or the server does not answer.
    """
    fs, path = file_system(url)
    # Over HTTP there are no folders, and asking for one would read the file.
    if is_http(url) or not steadily(url, lambda: fs.isdir(path)):
        yield RemoteFile(fs, path, url)
        return
    for found in sorted(steadily(url, lambda: fs.find(path))):
        if not any(part.startswith(".") for part in PurePosixPath(found).relative_to(path).parts):
            yield RemoteFile(fs, found, fs.unstrip_protocol(found))


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, of `fsspec`, and the name in it.

    Raises:
        UserError: the library of its protocol is not installed, or there is none.
    """
    import fsspec

    options = {}
    try:
        if is_http(url):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALL_S, sock_read=_STALL_S)
            options["client_kwargs"] = {"timeout": timeout}
        fs, path = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"source {url}: {str(error).splitlines()[0]}") from None
    return fs, path


def is_http(url: str) -> bool:
    """Whether a URL is http:// or https://."""
    return url.lower().startswith(("http://", "https://"))


class _Stream(io.RawIOBase):
    """Goes on at the byte where it broke off."""

    def __init__(self, fs: Any, path: str, url: str, info: dict[str, Any]) -> None:
        self._fs, self._path, self._url, self._info = fs, path, url, info
        self._size, self._at = int(info["size"]), 0
        self._file: IO[bytes] | None = None
        self._ranges = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._drop()
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        for number in range(TRIES):
            try:
                content = self._opened().read(wanted)
                if not content:
                    raise EOFError(f"the connection ended after {self._at:,} of {self._size:,} bytes")
                buffer[: len(content)] = content
                self._at += len(content)
                return len(content)
            except UserError:
                raise
            except Exception as error:
                self._drop()
                if isinstance(error, ValueError) and self._ranges:
                    self._ranges = False  # the server has sent more than the range that it was asked for
                    continue
                wait_before_next(number, self._url, error)
                self._require_unchanged()
        raise UserError(f"source {self._url}: the server fails")

    def close(self) -> None:
        self._drop()
        super().close()

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            # Without a block size, a file over HTTP is one answer, which is read to where the reading broke off.
            options = {} if self._ranges else {"block_size": 0}
            self._file = file = self._fs.open(self._path, "rb", **options)
            if self._ranges:
                file.seek(self._at)
            else:
                left = self._at
                while left and (skipped := file.read(min(left, _BUFFER))):
                    left -= len(skipped)
        assert self._file is not None
        return self._file

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:  # what is broken may not close
                return

    def _require_unchanged(self) -> None:
        self._fs.invalidate_cache()
        now = steadily(self._url, lambda: self._fs.info(self._path))
        if any(now.get(key) != self._info.get(key) for key in _IDENTITY):
            raise UserError(f"source {self._url}: has changed while it was read; start again")
