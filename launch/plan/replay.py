"""What a job's steps ask of its tables, from the real addresses, sharding and directory, over tokens streamed once.

Every token of every rank is hashed. Of the rows that come of it, those of a sample (`launch.plan.sampling`) are kept,
named once a rank as the planner does, and once an owner; each sampled owner's directory admits and evicts them as
`offload.window.store` does. Weights there are none.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from launch.plan.sampling import Ids, Sample, choose_sample, each_once
from launch.plan.stream import Piece, Stream
from offload.plan.sharding import Sharding
from offload.window.open import open_directory


@dataclass(frozen=True)
class OwnerTraffic:
    """One owner's, a step: means over the steps that count; rows of the whole shard.

    Attributes:
        rank: the owner.
        asked: rows that ranks ask of it.
        owned: rows of it that the step uses; the most of any step in `most`.
        fetched, written: rows into the window and out of it; None where the window is too small for a step.
        unions: by depth, the most rows that so many later steps and one use together.
    """

    rank: int
    asked: float
    owned: float
    most: float
    fetched: float | None
    written: float | None
    unions: dict[int, float]

    @property
    def hit_rate(self) -> float | None:
        """Of the rows that the step uses, those that were in the window."""
        return None if self.fetched is None else 1 - self.fetched / self.owned if self.owned else 1.0


@dataclass(frozen=True)
class Replayed:
    """What was replayed.

    Attributes:
        stream: where the tokens come from.
        steps, warmup: that count, and that came before them.
        thinned: one of so many rows was looked at; 1 is all.
        owners: the sampled owners' traffic.
        ranks: of the job.
        lookups: of a step, of all ranks.
    """

    stream: str
    steps: int
    warmup: int
    thinned: int
    owners: tuple[OwnerTraffic, ...]
    ranks: int
    lookups: int

    def mean(self, of: Callable[[OwnerTraffic], float | None]) -> float:
        """Over the sampled owners that have it."""
        found = [value for value in map(of, self.owners) if value is not None]
        return sum(found) / len(found) if found else 0.0

    def most(self, of: Callable[[OwnerTraffic], float | None]) -> float:
        """Of the sampled owners."""
        return max((value for value in map(of, self.owners) if value is not None), default=0.0)

    @property
    def imbalance(self) -> float:
        """The busiest sampled owner's rows over the mean."""
        mean = self.mean(lambda owner: owner.owned)
        return self.most(lambda owner: owner.owned) / mean if mean else 1.0

    @property
    def fits(self) -> bool:
        """Whether each sampled owner's window holds every step."""
        return all(owner.fetched is not None for owner in self.owners)


DEPTHS = (0, 1, 2, 4)


def replay(
    stream: Stream,
    ranks: int,
    sequences: int,
    window_rows: int,
    depth: int,
    *,
    steps: int,
    warmup: int,
    tokens: int,
    told: Callable[[int, int], object] = lambda step, of: None,
) -> Replayed:
    """Replays steps.

    Args:
        stream: of the tokens.
        ranks: that share the tables.
        sequences: of a step, a multiple of `ranks`.
        window_rows: slots of each rank.
        depth: look-ahead.
        steps, warmup: that count, and before them.
        tokens: of a step.
        told: hears of progress.
    """
    addresses = stream.addresses
    sharding = Sharding(tuple(addresses.num_rows(module) for module in range(addresses.num_modules)), ranks)
    slots = sum(1 for _ in addresses.fingerprint()["orders"]) * addresses.fingerprint()["heads"]
    lookups = tokens * slots * addresses.num_modules
    sample = choose_sample(sharding, lookups)
    asked, used = [], []
    for step in range(warmup + steps):
        told(step, warmup + steps)
        pieces = stream.pieces(step)
        step_asked, step_rows = _rows_of(pieces, addresses.all_rows, sample, max(1, sequences // ranks))
        asked.append(step_asked)
        used.append(step_rows)
    owners = tuple(
        _owner(sample, place, [each[place] for each in asked], [each[place] for each in used],
               window_rows, depth, warmup)  # fmt: skip
        for place in range(len(sample.owners))
    )
    return Replayed(stream.name, steps, warmup, sample.thinned, owners, ranks, lookups)


def _rows_of(
    pieces: Iterable[Piece], hashed: Callable[..., object], sample: Sample, sequences_a_rank: int
) -> tuple[list[int], list[Ids]]:
    """For each sampled owner, how many kept rows ranks ask of it, and which (places in its thinned shard)."""
    owners, modules = len(sample.owners), len(sample.sharding.num_rows)
    asked = np.zeros(owners, np.int64)
    found: list[list[list[Ids]]] = [[[] for _ in range(modules)] for _ in range(owners)]
    for rank_rows in _by_rank(pieces, hashed, sample, sequences_a_rank):
        for module, ids in enumerate(rank_rows):
            owner = sample.owner_of(module, ids)
            for place in range(owners):
                mine = ids[owner == place]
                asked[place] += len(mine)
                found[place][module].append(mine)
    rows = [
        np.concatenate([sample.places(module, place, each_once(*parts))
                        for module, parts in enumerate(found[place])])  # fmt: skip
        for place in range(owners)
    ]
    return asked.tolist(), rows


_NONE = np.empty(0, np.int64)


def _by_rank(
    pieces: Iterable[Piece], hashed: Callable[..., object], sample: Sample, sequences_a_rank: int
) -> Iterable[list[Ids]]:
    """For each rank, or each piece of many whole ranks with an id's rank kept apart, its kept rows, each once."""
    modules = len(sample.sharding.num_rows)
    carried: list[Ids] = [_NONE] * modules
    carried_rank = -1
    for piece in pieces:
        rows = hashed(piece.tokens_BT, piece.positions_BT).numpy()  # type: ignore[attr-defined]
        ranks_B = (piece.first + np.arange(len(piece.tokens_BT))) // sequences_a_rank
        per_sequence = rows[0].size // len(ranks_B)
        parts = []
        for module in range(modules):
            flat = rows[module].reshape(-1)
            places = sample.kept(flat)
            parts.append((ranks_B[places // per_sequence], flat[places]))
        for rank in np.unique(ranks_B):
            mine = [ids[ranks == rank] if len(ranks_B) > 1 else ids for ranks, ids in parts]
            if rank != carried_rank and carried_rank >= 0:
                yield carried
                carried = [_NONE] * modules
            carried_rank = int(rank)
            carried = [each_once(*both) for both in zip(carried, mine, strict=True)]
    if carried_rank >= 0:
        yield carried


def _owner(
    sample: Sample, place: int, asked: Sequence[int], used: Sequence[Ids], window_rows: int, depth: int, warmup: int
) -> OwnerTraffic:
    thinned, counted = sample.thinned, range(warmup, len(used))
    slots = min(max(1, window_rows // thinned), max(1, sample.shard_rows(place)))
    moved = _moved(used, max(1, sample.shard_rows(place)), slots, depth)
    mean = lambda values: thinned * sum(values) / len(counted)  # noqa: E731
    return OwnerTraffic(
        sample.owners[place],
        mean([asked[step] for step in counted]),
        mean([len(used[step]) for step in counted]),
        thinned * max(len(used[step]) for step in counted),
        None if moved is None else mean([moved[step][0] for step in counted]),
        None if moved is None else mean([moved[step][1] for step in counted]),
        {ahead: thinned * _union(used, ahead) for ahead in DEPTHS if ahead < len(used)},
    )


def _union(used: Sequence[Ids], ahead: int) -> int:
    starts = range(len(used) - ahead)
    return max(len(each_once(*used[start : start + ahead + 1])) for start in starts)


def _moved(used: Sequence[Ids], rows: int, slots: int, depth: int) -> list[tuple[int, int]] | None:
    """Rows fetched and written back for each step by a real directory; None if a step does not fit."""
    directory = open_directory(rows, slots)
    waiting: deque[int] = deque(range(len(used)))
    moved = []
    admitted: dict[int, tuple[int, int]] = {}
    for step in range(len(used)):
        while waiting and waiting[0] <= step + depth:
            following = used[waiting[0]]
            leaving = directory.evict(max(0, directory.keep(waiting[0], following) - directory.num_free))
            directory.written(leaving)
            admission = directory.admit(waiting[0], following)
            if admission is None:
                break
            directory.fetched(admission[1])
            admitted[waiting.popleft()] = len(admission[0]), len(leaving)
        if step not in admitted:
            return None
        directory.finish(step, directory.slots(used[step]))
        moved.append(admitted.pop(step))
    return moved
