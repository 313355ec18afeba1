"""Which checkpoints there are, and which may go."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint.listing import checkpoints_in, remove, remove_unfinished, superfluous


def test_only_complete_folders_of_the_name_count_and_they_are_in_order_of_steps(tmp_path: Path) -> None:
    for name, file in (
        ("step-00000020", "manifest.json"),
        ("step-00000003", "state.json"),
        ("step-100000000", "manifest.json"),
        ("step-00000004", "rank-00000.json"),
        ("step-00000005-mine", "manifest.json"),
        (".step-00000006.0a.partial", "manifest.json"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    assert [found.step for found in checkpoints_in(tmp_path)] == [3, 20, 100_000_000]
    assert checkpoints_in(tmp_path / "none") == []
    remove(tmp_path / "step-00000020")
    remove_unfinished(tmp_path)
    left = {"step-00000003", "step-100000000", "step-00000004", "step-00000005-mine"}
    assert {path.name for path in tmp_path.iterdir()} == left


@pytest.mark.parametrize(
    ("steps", "keep", "keep_every", "expected"),
    [
        ({2: True, 4: True, 6: True}, 2, None, [2]),
        ({2: True, 4: True, 6: True, 8: True}, 1, 4, [2, 6]),
        ({2: True, 4: True, 6: False}, 2, None, []),
        ({2: True, 4: True, 6: False, 8: False}, 2, None, [6]),
        ({2: True, 4: True, 6: False, 8: True}, 2, None, [2, 6]),
        ({2: False, 4: False}, 1, 2, [2]),
        ({}, 1, None, []),
    ],
)
def test_what_need_not_stay(steps: dict[int, bool], keep: int, keep_every: int | None, expected: list[int]) -> None:
    assert superfluous(steps, keep=keep, keep_every=keep_every) == expected


def test_what_one_that_stays_adds_to_stays() -> None:
    good, bases = {2: True, 3: True, 4: True, 6: False, 7: True, 8: True}, {3: 2, 4: 2, 7: 6, 8: 6}
    assert superfluous(good, keep=1, keep_every=None, bases=bases) == [2, 3, 4, 7]
    assert superfluous(good, keep=1, keep_every=4, bases=bases) == [3, 7]


def test_ephemeral_ones_go_with_the_next_good_one_and_displace_nothing() -> None:
    def gone(steps: dict[int, bool], *ephemeral: int) -> list[int]:
        return superfluous(steps, keep=2, keep_every=5, ephemeral=ephemeral)

    assert gone({2: True, 4: True, 6: True, 7: True}, 6, 7) == [6]
    assert gone({2: True, 4: True, 6: True, 8: True}, 6) == [2, 6]
    assert gone({2: True, 4: True, 6: True, 7: False}, 6) == [], "the newest good one stays"
    assert gone({2: True, 4: True, 5: True, 6: True}, 5) == [2, 5], "whatever its step"


@given(st.dictionaries(st.integers(1, 50), st.booleans(), min_size=1), st.integers(1, 3), st.integers(1, 9))
def test_the_newest_and_the_newest_good_ones_always_stay(steps: dict[int, bool], keep: int, keep_every: int) -> None:
    gone = superfluous(steps, keep=keep, keep_every=keep_every)
    good = sorted(step for step, is_good in steps.items() if is_good)
    assert not {max(steps), *good[-keep:]} & {*gone}
