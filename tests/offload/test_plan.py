"""The plan of a step against a slow reading of its lookups."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.gather import row_index
from offload.plan import _deduplicate, digest_tokens

parts = st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4)


@given(parts, st.sampled_from([0, 2**31, 2**40]))
def test_unique_rows_and_every_micro_batch_s_index(ids: list[list[int]], offset: int) -> None:
    rows = [torch.tensor(part, dtype=torch.int64) + offset for part in ids]
    unique, indices = _deduplicate(rows)
    assert unique.tolist() == sorted({row + offset for part in ids for row in part})
    for part, index in zip(rows, indices, strict=True):
        assert torch.equal(unique[index.index_N.long()], part)
        expected = row_index(index.index_N, len(unique))
        assert all(torch.equal(found, wanted) for found, wanted in zip(index, expected, strict=True))


def test_the_digest_sees_ids_order_and_zeros() -> None:
    tokens = torch.tensor([[0, 0, 5], [7, 0, 1]])
    others = [torch.tensor([[0, 0, 5], [0, 7, 1]]), torch.tensor([[0, 0, 5], [7, 0, 2]]), torch.zeros(2, 3).long()]
    assert len({digest_tokens([batch]) for batch in [tokens, *others]}) == 4
    assert digest_tokens([tokens]) != digest_tokens([tokens, torch.zeros(1, 1).long()])
