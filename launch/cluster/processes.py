"""Processes that start the ranks of other hosts, such as ssh: no signal reaches what they have started there."""

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from launch.local.start import Processes

_WAITING = "waiting {:g} s at most for the ranks to save and end; Ctrl-C again does not"
_OTHERS = "a host failed: waiting {:g} s at most for the ranks on the others to end; Ctrl-C does not"


class HostProcesses(Processes):
    """One for each host, or one for all.

    Args:
        grace_s, may_fail: see `Processes`. They have that time also when another one fails.
        attached: whether what they start ends with their standard input.
        ask: a command that asks it to end, in place of a signal to them.
    """

    kind = "host"

    def __init__(self, grace_s: float, *, may_fail: int = 0, attached: bool = False, ask: Sequence[str] = ()) -> None:
        super().__init__(grace_s, may_fail=may_fail, stdin=subprocess.PIPE if attached else subprocess.DEVNULL)
        self._ask = ask

    def ask_to_end(self) -> None:
        """See `Processes.ask_to_end`."""
        print(_WAITING.format(self.grace_s), file=sys.stderr, flush=True)
        if not self._ask:
            super().ask_to_end()
            return
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(self._ask, stdin=subprocess.DEVNULL, timeout=self.grace_s, check=False)

    def before_the_end(self) -> None:
        """What they started elsewhere does not end with a connection that is killed: the next start would meet it."""
        if self.received or all(rank.poll() is not None for rank in self.ranks):
            return
        print(_OTHERS.format(self.grace_s), file=sys.stderr, flush=True)
        for rank in self.ranks:
            rank.ask_to_end()
        self.until(lambda: bool(self.received), self.grace_s)
