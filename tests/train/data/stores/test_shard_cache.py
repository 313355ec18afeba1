"""The bounded cache: any order of its operations against a plain model, and several processes at once."""

import multiprocessing
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from train.data.stores.shard_cache import COUNT_BYTES, SHARD, ShardCache
from train.errors import UserError

LIMIT = 100
NAMES = st.sampled_from([f"{store}/{number}{SHARD}" for store in "ab" for number in range(6)])


def content_of(name: str, size: int) -> bytes:
    return (name * size)[:size].encode()


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class CacheMachine(RuleBasedStateMachine):
    """`used` has what must be there, longest unused first."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.cache = ShardCache(self.folder, LIMIT + COUNT_BYTES)
        self.used: dict[str, bytes] = {}
        self.claimed: dict[str, int] = {}
        self.clock = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def stamp(self, name: str) -> None:
        """Uses have distinct times, however fast they follow one another."""
        self.clock += 1
        path = self.folder / name
        os.utime(path, ns=(self.clock, path.stat().st_mtime_ns))

    def forget_evicted(self) -> None:
        gone = [name for name in self.used if not (self.folder / name).exists()]
        assert gone == list(self.used)[: len(gone)], "a shard went that was used after one that stayed"
        for name in gone:
            del self.used[name]

    @rule(name=NAMES, size=st.integers(1, 120))
    def keep(self, name: str, size: int) -> None:
        before = bytes_in(self.folder)
        known = name in self.used
        there = self.cache.keep(name, content_of(name, size))
        assert there == (known or size + sum(self.claimed.values()) <= LIMIT)
        if not known and before + size <= LIMIT - COUNT_BYTES:
            assert all((self.folder / each).exists() for each in self.used), "evicted without need"
        self.forget_evicted()
        if there and not known:
            self.used[name] = content_of(name, size)
            self.stamp(name)

    @rule(name=NAMES)
    def view(self, name: str) -> None:
        found = self.cache.view(name)
        assert (found.content.tobytes() if found else None) == self.used.get(name)
        if found:
            self.used[name] = self.used.pop(name)
            self.stamp(name)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        self.cache.drop(name)
        self.used.pop(name, None)

    @rule(name=st.sampled_from(["a/x", "b/x"]), size=st.integers(1, 40))
    def claim(self, name: str, size: int) -> None:
        others = sum(kept for other, kept in self.claimed.items() if other != name)
        if others + size > LIMIT:
            with pytest.raises(
                UserError, match=rf"data.cache_bytes: in {LIMIT + COUNT_BYTES} bytes there is no room for .*{name}"
            ):
                self.cache.claim(name, size)
            self.claimed.pop(name, None)
        else:
            self.cache.claim(name, size)
            self.claimed[name] = size
        self.forget_evicted()

    @rule()
    def open_again(self) -> None:
        self.cache = ShardCache(self.folder, LIMIT + COUNT_BYTES)
        self.forget_evicted()

    @rule(count=st.sampled_from(["", "0", "nonsense"]))
    def lose_the_count(self, count: str) -> None:
        """As a process that was killed while it wrote, before the cache is opened again."""
        (self.folder / ".used").write_text(count)
        self.open_again()

    @invariant()
    def holds_the_bound_and_what_was_not_evicted(self) -> None:
        if hasattr(self, "folder"):
            assert bytes_in(self.folder) <= LIMIT + COUNT_BYTES
            assert all((self.folder / name).stat().st_size == size for name, size in self.claimed.items())


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


def hammer(folder: Path, seed: int) -> None:
    cache, order = ShardCache(folder, 2000), random.Random(seed)
    for _ in range(400):
        name = f"s/{order.randrange(40)}{SHARD}"
        with cache.alone(f".fetching-{order.randrange(4)}"):
            view = cache.view(name)
            if view is None:
                cache.keep(name, content_of(name, 100))
            else:
                assert view.content.tobytes() == content_of(name, 100)


def test_processes_share_a_cache_within_its_bound(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=hammer, args=(tmp_path, seed)) for seed in range(3)]
    for other in others:
        other.start()
    most, cache = 0, ShardCache(tmp_path, 2000)
    while any(other.is_alive() for other in others):
        # Between two changes: a sum over a changing folder would be of no moment.
        with cache.alone(".lock"):
            most = max(most, bytes_in(tmp_path))
    assert [other.exitcode for other in others] == [0, 0, 0]
    assert 1000 < most <= 2000
