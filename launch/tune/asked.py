"""What a user asks of `engram tune`, as its ranks are told."""

import json
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Asked:
    """What a user asks for.

    Attributes:
        config, overrides: the job.
        folder: for the results.
        work: a folder for what the ranks' runs keep.
        digest: see `Results.job`.
        minutes: that all of it may take.
        exhaustive: measure every look-ahead with every window, in all rounds.
    """

    config: str
    overrides: list[str]
    folder: str
    work: str
    digest: str
    minutes: float
    exhaustive: bool


def worker_command(asked: Asked) -> list[str]:
    """The command line of a rank."""
    return [sys.executable, "-P", "-m", "launch.tune.worker", json.dumps(vars(asked))]
