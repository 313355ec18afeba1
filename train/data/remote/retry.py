"""Asks a server again while it fails, with longer and longer waits."""

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

from train.errors import UserError

T = TypeVar("T")

TRIES = 6
"""In a row without a byte."""
WAIT_S = 1.0
"""After the first failure; twice as long after each further one."""
LONGEST_WAIT_S = 30.0
"""The most between two tries."""


def persistently(what: str, ask: Callable[[], T], patience_s: float, tell: Callable[[str], object]) -> T:
    """What a server answers, asked again, with longer and longer waits, for as long as it fails; tells each wait.

    Raises:
        UserError: it has failed for `patience_s`, or says that there is no such file, or that it is not for us.
    """
    began = time.monotonic()
    for number in itertools.count():
        try:
            return ask()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"{what}: {told(error)}; check the URL, and who may read it") from None
        except Exception as error:
            wait, failed = min(WAIT_S * 2**number, LONGEST_WAIT_S), time.monotonic() - began
            if failed + wait > patience_s:
                raise UserError(
                    f"{what}: has failed for {failed:.0f} s, {number + 1} times, at last with {told(error)}; once the "
                    f"server is well, run the same command again"
                ) from None
            tell(f"{what}: {told(error)}; trying again in {wait:g} s")
            time.sleep(wait)
    raise AssertionError


def steadily(url: str, ask: Callable[[], T]) -> T:
    """What the server answers, asked again while it fails."""
    for number in range(TRIES):
        try:
            return ask()
        except UserError:
            raise
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"source {url}: {told(error)}") from None
        except Exception as error:
            wait_before_next(number, url, error)
    raise AssertionError


def wait_before_next(number: int, url: str, error: Exception) -> None:
    """Waits before another try; raises UserError instead of the last."""
    if number + 1 == TRIES:
        raise UserError(f"source {url}: failed {TRIES} times in a row, at last with {told(error)}; try again") from None
    time.sleep(WAIT_S * 2**number)


def told(error: Exception) -> str:
    """An error in one line."""
    text = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
