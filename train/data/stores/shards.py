"""The tokens of a store that lies elsewhere, as an array: shards are fetched as they are needed.

A shard is a piece of the token file: all are of one size but for the last.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from train.data.stores.shard_fetcher import ShardFetcher

_TOGETHER = 64
"""Shards that one read has in memory at a time."""


class ShardedTokens:
    """Takes the place of memory-mapped tokens where they are read: `tokens[a:b]` and `tokens[positions]`.

    May be used from several threads.

    Attributes:
        dtype, shape: of the tokens, as an array has them.
        shard_tokens: of a shard.
    """

    def __init__(self, fetcher: ShardFetcher, dtype: np.dtype, count: int, shard_tokens: int) -> None:
        """Args: what gives shards; what the tokens are, and how many; `shard_tokens`."""
        self.fetcher, self.dtype, self.shape, self.shard_tokens = fetcher, dtype, (count,), shard_tokens

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: slice | np.ndarray) -> np.ndarray:
        """Tokens of a slice with step 1, or at positions [F].

        Raises:
            UserError: a shard cannot be fetched, or is not what the store's checksums say.
        """
        if isinstance(where, slice):
            begin, end, step = where.indices(len(self))
            if step != 1:
                raise ValueError("only slices with step 1")
            return self._read([begin], [max(begin, end)])
        position_F = np.asarray(where, dtype=np.int64)
        breaks = np.flatnonzero(np.diff(position_F) != 1)
        begins = position_F[np.append(0, breaks + 1)[: len(position_F)]]
        ends = position_F[np.append(breaks, len(position_F) - 1)[: len(position_F)]] + 1
        return self._read(begins.tolist(), ends.tolist())

    def ahead(self, starts_P: np.ndarray, lengths_P: np.ndarray, budget: int) -> int:
        """Has the shards of pieces, int64 [P], fetched in the background, at most `budget`; returns how many."""
        used = lengths_P > 0
        first_P = starts_P[used] // self.shard_tokens
        count_P = (starts_P + lengths_P - 1)[used] // self.shard_tokens - first_P + 1
        ends_P = np.cumsum(count_P)
        every = np.arange(count_P.sum()) + np.repeat(first_P - ends_P + count_P, count_P)
        numbers = np.unique(every)[:budget].tolist()
        self.fetcher.ahead(numbers)
        return len(numbers)

    def check(self) -> None:
        """Fetches every shard. Raises UserError for one that is damaged."""
        for begin in range(0, len(self), self.shard_tokens * _TOGETHER):
            self[begin : begin + self.shard_tokens * _TOGETHER]

    @property
    def room(self) -> int:
        """Shards that the cache has room for."""
        return self.fetcher.limit // (self.shard_tokens * self.dtype.itemsize)

    def _read(self, begins: Sequence[int], ends: Sequence[int]) -> np.ndarray:
        found = np.empty(sum(ends) - sum(begins), dtype=self.dtype)
        parts: dict[int, list[tuple[int, int, int]]] = {}
        for number, part in self._parts(begins, ends):
            parts.setdefault(number, []).append(part)
        numbers = sorted(parts)
        for place in range(0, len(numbers), _TOGETHER):
            for number, content in self.fetcher.take(numbers[place : place + _TOGETHER]).items():
                tokens = content.view(self.dtype)
                for begin, end, at in parts[number]:
                    found[at : at + end - begin] = tokens[begin:end]
        return found

    def _parts(self, begins: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """Of each run of tokens its parts: the shard, begin and end in it, and the place in the result."""
        at = 0
        for begin, end in zip(begins, ends, strict=True):
            while begin < end:
                number, first = divmod(begin, self.shard_tokens)
                size = min(end - begin, self.shard_tokens - first)
                yield number, (first, first + size, at)
                at, begin = at + size, begin + size


Tokens = np.ndarray | ShardedTokens
"""The tokens of a store."""
