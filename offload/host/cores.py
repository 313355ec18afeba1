"""How many cores there are."""

import os


def usable_cores() -> int:
    """Cores that this process may run on."""
    # Not every system can restrict a process to some of them.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
