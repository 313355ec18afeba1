"""The operations for a GPU, on CPU tensors, against the compiled loop; and the memory that they take."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.deduplicate import deduplicate
from kernels.deduplicate.together import Deduplicated, deduplicate_together
from tests.kernels.deduplicate.test_deduplicate import parts
from tests.kernels.launches import on_a_gpu

INT_TYPES = (torch.int32, torch.int64)


def together(rows: list[Tensor], dtype: torch.dtype) -> Deduplicated:
    bounds = list(accumulate((len(part) for part in rows), initial=0))
    return deduplicate_together(torch.cat(rows).to(dtype), torch.tensor(bounds))


@settings(deadline=None)  # the first call compiles the loop
@given(parts, st.sampled_from(INT_TYPES))
def test_the_tensors_of_the_compiled_loop(ids: list[list[int]], dtype: torch.dtype) -> None:
    rows = [torch.tensor(part, dtype=torch.int64) for part in ids]
    expected_unique, expected = deduplicate(rows)
    found = together(rows, dtype)
    indices = found.indices([len(part) for part in rows], found.segments_B.tolist())
    assert found.unique_U.dtype == dtype
    assert torch.equal(found.unique_U, expected_unique.to(dtype))
    for index, wanted in zip(indices, expected, strict=True):
        assert index.num_rows == wanted.num_rows
        for part, other in zip(index.tensors, wanted.tensors, strict=True):
            assert part.dtype == other.dtype
            assert torch.equal(part, other)
            assert part.untyped_storage().nbytes() == part.nbytes, "it keeps other memory, and begins anywhere in it"


def test_as_many_micro_batches_and_rows_as_do_not_fit_into_32_bits_together() -> None:
    ids = torch.randperm(50_000, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    found = deduplicate_together(ids, torch.arange(50_001))
    assert torch.equal(found.rows_V, ids)
    assert found.segments_B.eq(1).all()


def test_the_operations_are_as_few_for_many_micro_batches_as_for_one() -> None:
    ids = torch.randint(1000, (4096,), dtype=torch.int32)

    def operations(batches: int) -> int:
        bounds = torch.arange(0, 4097, 4096 // batches)
        with on_a_gpu() as counted:
            deduplicate_together(ids, bounds)
        return counted.total()

    assert operations(256) == operations(1) <= 32


@pytest.mark.parametrize("dtype", INT_TYPES)
def test_it_takes_no_more_memory_than_it_says(dtype: torch.dtype) -> None:
    """All rows read once: then there are as many of everything as there are lookups."""
    ids = torch.randperm(1 << 16).to(dtype)
    with peak() as bytes_taken:
        deduplicate_together(ids, torch.arange(0, len(ids) + 1, len(ids) // 4))
    assert 70 * len(ids) < bytes_taken() <= 84 * len(ids) + 1000


@contextmanager
def peak() -> Iterator[Any]:
    """The most bytes at a time of the tensors that operations within have made."""
    with _Living() as living:
        yield lambda: living.most


class _Living(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._tensors: list[tuple[weakref.ref[Tensor], int, int]] = []

    def __torch_dispatch__(self, operation: Any, _types: object, arguments: Any = (), options: Any = None) -> Any:
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                memory = tensor.untyped_storage()
                self._tensors.append((weakref.ref(tensor), memory.data_ptr(), memory.nbytes()))
        self._tensors = [kept for kept in self._tensors if kept[0]() is not None]
        self.most = max(self.most, sum({start: nbytes for _, start, nbytes in self._tensors}.values()))
        return result
