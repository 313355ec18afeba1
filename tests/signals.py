"""Signals that tests send to the processes they start."""

import signal

import pytest


def skip_if_ignored(signum: int) -> None:
    """Skips the test: children inherit what is ignored, and a shell has its background jobs ignore some signals."""
    if signal.getsignal(signum) is signal.SIG_IGN:
        pytest.skip(f"{signal.Signals(signum).name} is ignored here, as under nohup")
