"""The replay against counts by hand, and against real tables that train on the same tokens."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from launch.plan.rows.replay import replay
from launch.plan.rows.sampling import Sample, choose_sample
from launch.plan.rows.stream import Piece, ZipfStream
from launch.plan.rows.traffic import Replayed
from offload import opening
from offload.plan.plan import Tokens
from offload.plan.sharding import Sharding
from offload.rows.records import RowInit
from offload.tables import EngramTables
from train.config.file import load
from train.config.job import JobConfig

TINY = Path(__file__).parents[3] / "configs" / "tiny.yaml"
SMALL = ("model.engram.rows_per_head=3000", "data.sequence_length=64", "train.global_batch_size=24")


def stream_of(*overrides: str) -> ZipfStream:
    return ZipfStream(load(TINY, [*SMALL, *overrides], JobConfig), 1.1)


def replayed(stream: ZipfStream, ranks: int, window: int = 10_000, steps: int = 3) -> Replayed:
    return replay(stream, ranks, 24, window, steps=steps, warmup=0, tokens=24 * 64)


def rows_by_hand(stream: ZipfStream, step: int, ranks: int) -> list[list[set[int]]]:
    """For each rank and module, the rows that its own sequences read."""
    addresses = stream.addresses
    (piece,) = stream.pieces(step)
    per_rank = zip(piece.tokens_BT.chunk(ranks), piece.positions_BT.chunk(ranks), strict=True)
    return [[set(module.flatten().tolist()) for module in addresses.all_rows(*part)] for part in per_rank]


def test_owners_and_ranks_ask_as_counted_by_hand() -> None:
    stream, ranks = stream_of(), 4
    found = replayed(stream, ranks)
    addresses = stream.addresses
    sharding = Sharding(tuple(addresses.num_rows(module) for module in range(2)), ranks)
    assert found.thinned == 1
    for owner in found.owners:
        asked = owned = 0
        for step in range(3):
            by_rank = rows_by_hand(stream, step, ranks)
            for module in range(2):
                mine = sharding.owned(module, owner.rank)
                parts = [{row for row in rows[module] if row in mine} for rows in by_rank]
                asked += sum(map(len, parts))
                owned += len(set().union(*parts))
        assert (owner.asked, owner.owned) == (asked / 3, owned / 3)
    assert found.lookups == 24 * 64 * 16


def test_pieces_of_a_step_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's sequences may lie in several pieces, and a piece may hold several ranks'."""
    (whole,) = stream_of().pieces(0)
    found = {}
    for size in (24, 5, 1):
        monkeypatch.setattr("launch.plan.rows.stream.PIECE_TOKENS", size * 64)
        assert [piece.first for piece in stream_of().pieces(0)] == list(range(0, 24, size))
        pieces = [
            Piece(first, whole.tokens_BT[first : first + size], whole.positions_BT[first : first + size])
            for first in range(0, 24, size)
        ]
        monkeypatch.setattr(ZipfStream, "pieces", lambda _self, _step, pieces=pieces: pieces)
        found[size] = replayed(stream_of(), 3, steps=1).owners
        monkeypatch.undo()
    assert found[5] == found[24] == found[1]


def test_every_so_many_th_row_stands_for_all() -> None:
    stream = stream_of("model.engram.rows_per_head=100000", "data.sequence_length=2048")
    exact = replay(stream, 4, 24, 10**6, steps=2, warmup=0, tokens=24 * 2048)
    with mock.patch("launch.plan.rows.sampling._MOST_KEPT", 24 * 2048):
        thinned = replay(stream, 4, 24, 10**6, steps=2, warmup=0, tokens=24 * 2048)
    assert (exact.thinned, thinned.thinned) == (1, 16)
    for one, other in zip(exact.owners, thinned.owners, strict=True):
        assert other.owned == pytest.approx(one.owned, rel=0.05)
        assert other.asked == pytest.approx(one.asked, rel=0.05)
        assert other.hit_rate == pytest.approx(one.hit_rate, abs=0.03)


def test_of_many_owners_some_are_looked_at_exactly() -> None:
    sharding = Sharding((10**6, 10**6), 4096)
    sample = choose_sample(sharding, 10**6)
    assert (len(sample.owners), sample.owners[0], sample.owners[-1], sample.thinned) == (16, 0, 4095, 1)
    ids = np.arange(10**6)
    owner = sample.owner_of(1, ids)
    for place, rank in enumerate(sample.owners):
        mine = sharding.owned(1, rank)
        assert np.flatnonzero(owner == place).tolist() == list(mine)
    thin = Sample(sharding, (5,), 64)
    kept = ids[thin.kept(ids)]
    mine = kept[thin.owner_of(0, kept) == 0]
    assert thin.places(0, 0, mine).tolist() == list(range(len(mine)))
    assert thin.places(1, 0, mine).tolist() == list(range(len(mine), 2 * len(mine)))


@pytest.mark.parametrize("depth", [0, 2])
def test_hits_are_those_of_real_tables(depth: int) -> None:
    """On the same tokens, through a window of two thirds of the rows, with decisions on a thread as on a GPU."""
    stream, steps = stream_of("model.engram.rows_per_head=6000"), 8
    window = 60_000
    found = replayed(stream, 1, window, steps)
    with mock.patch.object(opening, "_DECIDING_BESIDE", ("cpu",)):
        opened = EngramTables(
            stream.job.offload.model_copy(update={"window_rows": window, "depth": depth}),
            stream.addresses,
            dim=1,
            init=RowInit(0, 0.02),
            batches=lambda step: [Tokens(*next(iter(stream.pieces(step)))[1:])],
            num_steps=steps,
        )
    fetched = requested = stored = 0
    for step in range(steps):
        begun = opened.begin(step)
        begun.reduce()
        begun.apply(lr=1.0)
        traffic = opened.take_traffic()
        requested += traffic.requested
        fetched += traffic.requested - traffic.hits
        stored += traffic.fetched
    opened.close()
    (owner,) = found.owners
    assert owner.owned == requested / steps
    assert owner.fetched == fetched / steps
    assert owner.stored == stored / steps
    assert 0 < owner.stored < owner.fetched
    assert 0 < owner.hit_rate < 1
    assert owner.written


def test_a_window_too_small_for_a_step_is_known() -> None:
    found = replayed(stream_of(), 1, window=100)
    assert not found.fits
    assert found.owners[0].hit_rate is None
