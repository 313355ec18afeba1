"""Grids of parameters have every combination, and each value among those that are not long."""

import itertools

from tests.grid import grid


def test_every_combination_is_there_once_and_each_value_in_a_short_case() -> None:
    axes = ["abcde", (1, 2), (None, True, False)]
    cases = grid(*axes)
    assert [case.values for case in cases] == [*itertools.product(*axes)]
    short = [case.values for case in cases if not case.marks]
    assert len(short) == 5
    assert [set(values) for values in zip(*short, strict=True)] == [set(axis) for axis in axes]
    assert {mark.name for case in cases for mark in case.marks} == {"long"}
