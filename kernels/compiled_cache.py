"""Keeps the machine code of compiled loops: one folder per user, for all checkouts, launches and ranks.

Numba's own caches are keyed by a file's path, so that each copy of the code would be compiled again, and by that file's
content alone, although a compiled function contains constants and functions of others. This one is keyed by the content
of all files that a function can use. Of processes that miss the same function, one compiles it, and the others wait.
What no process has used for a month is removed when there is something new to keep.
"""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numba import __version__, config
from numba.core.caching import FunctionCache, NullCache, _CacheLocator

_KERNELS = Path(__file__).parent
_POLL_S = 0.05
_STUCK_S = 300.0
"""Longest wait for another process to compile; all loops together take some twenty seconds."""
_UNUSED_S = 30 * 24 * 3600.0
_STAMP = re.compile(r"[0-9a-f]{16}")


def keep_compiled(dispatcher: Any, function: Callable[..., Any]) -> None:
    """Keeps what Numba compiles of a function, as `cache=True` does, unless no folder can be written."""
    if _root() is None:
        dispatcher._cache = NullCache()
        return
    dispatcher._cache = kept = _SharedCache(function)
    compile_it = dispatcher.compile

    def compile_or_let_go(types: Any) -> Any:
        held = kept.held
        try:
            return compile_it(types)
        except BaseException:
            kept.let_go(held)
            raise

    dispatcher.compile = compile_or_let_go


class _Locator(_CacheLocator):
    """Locates a function's cache files by what it is compiled from."""

    def __init__(self, function: Any) -> None:
        self._module, self._line = function.__module__, function.__code__.co_firstlineno
        self._py_file = function.__code__.co_filename
        self._stamp = _sources(self._module.partition(".")[0])

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> "_Locator":
        return cls(py_func)

    def get_cache_path(self) -> str:
        return str(_folder(self._stamp) / self._module)

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        return str(self._line)


class _SharedCache(FunctionCache):
    """Holds the folder's lock from the miss of a function until it is saved.

    Attributes:
        held: how many times the lock is held.
    """

    class _impl_class(FunctionCache._impl_class):
        _locator_classes = (_Locator,)

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._folder, self.held = _folder(self._impl.locator.get_source_stamp()), 0
        _ = self._lock  # the folder counts as used

    @property
    def _lock(self) -> FileLock:
        return _lock(self._folder, os.getpid())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code kept for these types; None if this process has to compile it."""
        deadline = time.monotonic() + _STUCK_S
        while (found := super().load_overload(sig, target_context)) is None and time.monotonic() < deadline:
            try:
                self._lock.acquire(timeout=0)
            except Timeout:  # another process is compiling this, or something before it
                time.sleep(_POLL_S)
                continue
            except (OSError, NotImplementedError):  # a disk without locks
                return None
            if (found := super().load_overload(sig, target_context)) is None:
                self.held += 1
                return None
            self._lock.release()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keeps what was compiled, under the lock: two processes saving at once would give two functions one file."""
        if not self.held:
            return
        try:
            super().save_overload(sig, data)
        except OSError:
            pass  # a full disk: it is compiled again next time
        finally:
            self.let_go(self.held - 1)

    def let_go(self, held: int) -> None:
        """Releases the lock down to `held` holds: what was to be compiled is saved, or cannot be compiled."""
        while self.held > held:
            self.held -= 1
            self._lock.release()


@cache
def _root() -> Path | None:
    """The first writable folder of three: NUMBA_CACHE_DIR's, the user's, and one beside the code."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "engram-pretrain" / "numba"
    for root in [Path(config.CACHE_DIR)] if config.CACHE_DIR else [caches, _KERNELS / "__pycache__" / "numba"]:
        try:
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError:
            continue
        return root
    return None


def _folder(stamp: str) -> Path:
    root = _root()
    assert root is not None
    return root / stamp


@cache
def _lock(folder: Path, process: int) -> FileLock:
    """One for each process: a forked one may not use its parent's."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        os.utime(folder)
        if new:
            _prune(folder.parent)
    return FileLock(folder / "lock", thread_local=False)


def _prune(root: Path) -> None:
    """Removes what was compiled from states of the files that no process has started with for a month."""
    for folder in root.iterdir():
        if _STAMP.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > _UNUSED_S:
            with suppress(Timeout), FileLock(folder / "lock").acquire(timeout=0):
                shutil.rmtree(folder, ignore_errors=True)


@cache
def _sources(package: str) -> str:
    """Identifies the state of a package's files and of the kernels that it calls."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=8)
    for folder in sorted({_KERNELS, *map(Path, getattr(sys.modules[package], "__path__", ()))}):
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
