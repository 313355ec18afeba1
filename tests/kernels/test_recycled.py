"""Memory of earlier results: taken again, but never from under anybody who holds it."""

import pytest
import torch

from kernels import recycled

LARGE = (1 << 10, 1 << 10)


@pytest.fixture(autouse=True)
def no_blocks(monkeypatch):
    monkeypatch.setattr(recycled, "_blocks", [])


def test_memory_that_nobody_holds_is_taken_again():
    first = recycled.empty(LARGE, torch.float32)
    place = first.data_ptr()
    del first
    assert recycled.empty(LARGE, torch.float32).data_ptr() == place
    assert recycled.empty((1 << 21,), torch.bfloat16).data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[3:5, 7],
        lambda tensor: tensor.view(torch.int32).detach(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: tensor.T @ torch.ones(1 << 10, 1, requires_grad=True),  # saved for a backward
    ],
    ids=["itself", "view", "other type", "array", "storage", "graph"],
)
def test_memory_is_left_to_whoever_holds_it(hold):
    first = recycled.empty(LARGE, torch.float32)
    place, held = first.data_ptr(), hold(first)
    del first
    assert recycled.empty(LARGE, torch.float32).data_ptr() != place
    del held
    assert recycled.empty(LARGE, torch.float32).data_ptr() == place or len(recycled._blocks) == 2


def test_blocks_that_became_too_small_are_given_back():
    for rows in (1 << 10, 1 << 11, 1 << 12):
        recycled.empty((rows, 1 << 10), torch.float32)
    assert len(recycled._blocks) == 1


def test_small_and_empty_results_are_ordinary_memory():
    assert recycled.empty((0, 5), torch.float32).shape == (0, 5)
    assert recycled.empty((3, 5), torch.float64).dtype == torch.float64
    assert not recycled._blocks
