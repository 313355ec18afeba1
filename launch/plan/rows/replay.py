"""What a job's steps require of its tables, from the real addresses, sharding and directory, over tokens streamed once.

Every token of every rank is hashed. Of the resulting rows, those of a sample (`launch.plan.rows.sampling`) are kept,
once per rank as the planner does, and once per owner; each sampled owner's directory admits and evicts them as
`offload.window.store` does. There are no weights.
"""

from collections.abc import Callable, Iterable

import numpy as np

from launch.plan.rows.sampling import Ids, Sample, choose_sample, each_once
from launch.plan.rows.stream import Piece, Stream
from launch.plan.rows.traffic import Replayed, owner_traffic
from offload.plan.sharding import Sharding


def replay(
    stream: Stream,
    ranks: int,
    sequences: int,
    window_rows: int | None,
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
        window_rows: slots of each rank; None: a quarter more than any step uses.
        steps, warmup: those that count, and those before them.
        tokens: of a step.
        told: is told of the progress.
    """
    addresses = stream.addresses
    sharding = Sharding(tuple(addresses.num_rows(module) for module in range(addresses.num_modules)), ranks)
    fingerprint = addresses.fingerprint()
    lookups = tokens * len(fingerprint["orders"]) * fingerprint["heads"] * addresses.num_modules
    sample = choose_sample(sharding, lookups)
    asked, used = [], []
    for step in range(warmup + steps):
        told(step, warmup + steps)
        pieces = stream.pieces(step)
        step_asked, step_rows = _rows_of(pieces, addresses.all_rows, sample, max(1, sequences // ranks))
        asked.append(step_asked)
        used.append(step_rows)
    owners = tuple(
        owner_traffic(
            sample, place, [each[place] for each in asked], [each[place] for each in used], window_rows, warmup
        )
        for place in range(len(sample.owners))
    )
    return Replayed(stream.name, steps, warmup, sample.thinned, owners, ranks, lookups)


def _rows_of(
    pieces: Iterable[Piece], hashed: Callable[..., object], sample: Sample, sequences_a_rank: int
) -> tuple[list[int], list[Ids]]:
    """For each sampled owner, how many kept rows ranks request from it, and which (places in its thinned shard)."""
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
        np.concatenate([sample.places(module, place, each_once(*parts)) for module, parts in enumerate(found[place])])
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
