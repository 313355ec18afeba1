import pytest

from train.optim.flat_parts import Run, check_complete, owned_runs

A, B = ("a", (2, 3)), ("b", (4,))


C = ("c", (5,))


def test_of_ranks_with_equal_copies_the_one_with_the_least_so_far_keeps_them():
    copies = [Run(*A, 0, 6, 0), Run(*B, 0, 4, 6), Run(*C, 0, 5, 10)]
    layout = [[copies, []], [copies, [Run("own", (9,), 0, 9, 0)]]]
    of_rank_0, of_rank_1 = owned_runs(layout)
    assert [[run.name for run in part] for part in of_rank_0] == [["a"], []]
    assert [[run.name for run in part] for part in of_rank_1] == [["b", "c"], ["own"]]


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
