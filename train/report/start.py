"""What a run prints while it starts."""

import os


def tell_start(text: str) -> None:
    """One line on the standard output of rank 0, which may not have joined the others yet."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
