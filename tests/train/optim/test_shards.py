import pytest
import torch

from train.optim.shards import Run, check_complete, load_run, owned_runs

A, B = ("a", (2, 3)), ("b", (4,))


def test_of_equal_copies_the_lowest_rank_stands_for_them():
    layout = [[[Run(*A, 0, 6, 0)], []], [[Run(*A, 0, 6, 9)], [Run(*B, 0, 4, 0)]]]
    assert owned_runs(layout) == [[[Run(*A, 0, 6, 0)], []], [[], [Run(*B, 0, 4, 0)]]]


def test_parts_and_copies_that_cover_everything_pass():
    check_complete([[[Run(*A, 0, 4, 0), Run(*B, 0, 4, 4)]], [[Run(*A, 4, 2, 0), Run(*B, 0, 4, 2)]]], dict((A, B)))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([Run(*A, 0, 5, 0), Run(*B, 0, 4, 5)], "a part or a multiple of a"),
        ([Run(*A, 0, 6, 0), Run(*A, 1, 5, 6), Run(*B, 0, 4, 11)], "a part or a multiple of a"),
        ([Run(*A, 0, 6, 0)], "a part or a multiple of b"),
        ([Run("a", (3, 2), 0, 6, 0), Run(*B, 0, 4, 6)], r"holds a \(3, 2\), the model has \(2, 3\)"),
        ([Run(*A, 0, 6, 0), Run(*B, 0, 4, 6), Run("c", (1,), 0, 1, 10)], r"the model has None"),
    ],
)
def test_a_hole_an_overlap_or_a_stranger_is_found(runs, message):
    with pytest.raises(RuntimeError, match=message):
        check_complete([[runs]], dict((A, B)))


def test_a_run_is_loaded_in_its_place_only():
    flat = torch.zeros(2, 4)
    load_run(flat, Run("a", (2, 3), 2, 3, 4), torch.arange(6.0, dtype=torch.float64).view(3, 2).T.contiguous())
    assert flat.view(-1).tolist() == [0, 0, 0, 0, 4, 1, 3, 0]
