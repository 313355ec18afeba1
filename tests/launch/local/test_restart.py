import pytest

from launch.local.failures import RankFailed
from launch.local.restart import with_restarts
from train.errors import UserError


def calls(outcomes: list[int | Exception], restarts: int) -> tuple[int, list[bool], list[str]]:
    """Exit code, what each call was told, and what was told of it."""
    seen: list[bool] = []
    told: list[str] = []

    def run(again: bool) -> int:
        seen.append(again)
        outcome = outcomes[len(seen) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return with_restarts(run, restarts, told.append), seen, told


def test_a_crash_is_told_once_and_the_ranks_start_again() -> None:
    code, seen, told = calls([RankFailed("rank 1 was killed"), RankFailed("rank 0 failed"), 0], 3)
    assert (code, seen) == (0, [False, True, True])
    assert told == [
        "rank 1 was killed\nrestarting all ranks (1 of 3: train.restarts)",
        "rank 0 failed\nrestarting all ranks (2 of 3: train.restarts)",
    ]


def test_the_last_failure_is_the_callers() -> None:
    with pytest.raises(RankFailed, match="third"):
        calls([RankFailed("first"), RankFailed("second"), RankFailed("third"), 0], 2)
    with pytest.raises(RankFailed, match="first"):
        calls([RankFailed("first"), 0], 0)


def test_a_mistake_or_an_interruption_is_no_reason_to_start_again() -> None:
    with pytest.raises(UserError):
        calls([UserError("train.steps"), 0], 3)
    assert calls([75, 0], 3) == (75, [False], [])
