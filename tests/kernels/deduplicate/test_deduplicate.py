"""Unique rows and indices against a slow reading of the lookups, and the compiled loop against the reference."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kernels.deduplicate import deduplicate, deduplicate_reference
from kernels.gather import row_index

# Many equal rows, in micro-batches of different lengths, some of them empty.
parts = st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=4)


@given(parts, st.sampled_from([0, 2**30, 2**32 - 13, 2**32 - 12, 2**40]))
@example([[12, 0, 12], [1, 12]], 2**32 - 12)
def test_unique_rows_and_every_micro_batch_s_index(ids: list[list[int]], offset: int) -> None:
    rows = [torch.tensor(part, dtype=torch.int64) + offset for part in ids]
    unique, indices = deduplicate(rows)
    assert unique.dtype == torch.int64
    assert unique.tolist() == sorted({row + offset for part in ids for row in part})
    assert len(indices) == len(rows)
    for part, index in zip(rows, indices, strict=True):
        assert torch.equal(unique[index.index_N.long()], part)
        expected = row_index(index.index_N, len(unique))
        assert index.num_rows == expected.num_rows
        assert all(map(torch.equal, index.tensors, expected.tensors))


def test_many_rows_as_the_reference_has_them() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, high, (3, count), generator=generator) for high, count in ((90, 700), (5000, 2000))]
    unique, indices = deduplicate(rows)
    expected_unique, expected = deduplicate_reference(torch.cat([part.flatten() for part in rows]), [2100, 6000])
    assert torch.equal(unique, expected_unique)
    for index, wanted in zip(indices, expected, strict=True):
        for part, reference in zip(index.tensors, wanted.tensors, strict=True):
            assert part.dtype == reference.dtype == torch.int32
            assert torch.equal(part, reference)
