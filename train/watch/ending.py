"""Which signals ask a process to end, and which of them are one and the same. To be imported without PyTorch."""

import signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_S = 3.0
"""Seconds after the first signal in which further ones count as that one."""
