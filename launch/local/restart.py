"""Starts the ranks of a run again after one of them crashed."""

from collections.abc import Callable

from launch.local.failures import RankFailed


def with_restarts(run: Callable[[bool], int], restarts: int, tell: Callable[[str], None]) -> int:
    """Calls `run`, and again up to `restarts` times while a rank fails; returns its exit code.

    A user's mistake or a signal ends it.

    Args:
        run: is given whether it was run before.
        restarts: how many there may be.
        tell: is given each failure but the last.

    Raises:
        RankFailed: a rank failed once more than that.
    """
    for number in range(1, restarts + 1):
        try:
            return run(number > 1)
        except RankFailed as failure:
            tell(f"{failure}\nrestarting all ranks ({number} of {restarts}: train.restarts)")
    return run(restarts > 0)
