"""Ownership of rows at any world size, empty shards included."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.plan.sharding import Sharding

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@given(sizes, st.integers(1, 9))
def test_every_row_has_one_owner_and_one_place(num_rows: list[int], world_size: int) -> None:
    sharding = Sharding(tuple(num_rows), world_size)
    everyones = []
    for rank in range(world_size):
        places = torch.arange(sharding.shard_rows(rank))
        ids = sharding.global_ids(rank, places)
        back, mine = sharding.to_places(rank, ids)
        assert mine.all()
        assert torch.equal(back, places)
        everyones.append(ids)
    assert torch.cat(everyones).sort().values.tolist() == list(range(sum(num_rows)))


@given(sizes, st.integers(1, 9), st.data())
def test_a_rank_takes_its_own_rows_and_no_others(num_rows: list[int], world_size: int, data: st.DataObject) -> None:
    sharding = Sharding(tuple(num_rows), world_size)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, sum(num_rows) - 1), unique=True)), dtype=torch.int64)
    taken = [ids[sharding.to_places(rank, ids)[1]] for rank in range(world_size)]
    assert sorted(torch.cat(taken).tolist()) == sorted(ids.tolist())


@given(sizes, st.integers(1, 9), st.data())
def test_counts_are_those_of_a_linear_search(num_rows: list[int], world_size: int, data: st.DataObject) -> None:
    sharding = Sharding(tuple(num_rows), world_size)
    module = data.draw(st.integers(0, len(num_rows) - 1))
    rows = sorted(data.draw(st.sets(st.integers(0, num_rows[module] - 1))))
    counts = sharding.counts(module, torch.tensor(rows, dtype=torch.int64)).tolist()
    assert counts == [sum(row in sharding.owned(module, rank) for row in rows) for rank in range(world_size)]
    assert all(
        sharding.to_shard(module, rank, torch.tensor(list(sharding.owned(module, rank)), dtype=torch.int64)).tolist()
        == list(range(sharding.shard_offset(module, rank), sharding.shard_offset(module, rank) + counted))
        for rank, counted in enumerate(len(sharding.owned(module, rank)) for rank in range(world_size))
    )
