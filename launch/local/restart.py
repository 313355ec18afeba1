"""Starts the ranks of a run again after one of them crashed."""

from collections.abc import Callable

from launch.local.failures import RankFailed


def with_restarts(run: Callable[[bool], int], restarts: int, tell: Callable[[str], None]) -> int:
    """Calls `run`, and again as often as `restarts` while a rank fails; returns its exit code.

    Mistakes of the user, and signals, end it.

    Args:
        run: gets whether it was run before.
        restarts: times.
        tell: hears of each failure that is not the last.

    Raises:
        RankFailed: a rank failed once more than that.
    """
    for number in range(1, restarts + 1):
        try:
            return run(number > 1)
        except RankFailed as failure:
            tell(f"{failure}\nrestarting all ranks ({number} of {restarts}: train.restarts)")
    return run(restarts > 0)
