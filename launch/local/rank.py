"""One rank of a training job: what `engram train` starts as a process, or becomes under torchrun and srun."""

import argparse
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, TextIO

from launch.local.failures import leave, leave_exit_code, reported
from launch.local.signals import leave_to_system
from train.errors import Interrupted


def rank_command(config: str, overrides: Sequence[str], *, as_json: bool) -> list[str]:
    """The command line of one rank."""
    # -P: the user's folder may hold a train.py of its own.
    return [sys.executable, "-P", "-m", "launch.local.rank", *(["--json"] if as_json else []), "--", config, *overrides]


def run_rank(config: str, overrides: Sequence[str], *, as_json: bool) -> None:
    """Trains as the rank that RANK and WORLD_SIZE say; rank 0 ends with the summary on standard output.

    Raises:
        UserError: whatever is wrong with the config, the data or the machine.
        Interrupted: by a signal; rank 0 has reported it, in JSON if asked to.
    """
    with _answer_only(as_json) as answer:
        from train.report.start import tell_start

        tell_start("importing PyTorch and DeepSpeed")
        gc.disable()  # nothing that is imported is garbage, and visiting it again and again takes a fifth of the time
        from train.config.file import base_of, load
        from train.config.job import JobConfig
        from train.run import train

        gc.enable()
        try:
            summary = train(load(config, overrides, JobConfig), leave, base=base_of(config))
        except Interrupted as interrupted:
            if as_json and os.environ["RANK"] == "0":
                print(json.dumps({"interrupted": str(interrupted)}), file=answer, flush=True)
            raise
        if summary is not None:
            text = json.dumps(dataclasses.asdict(summary)) if as_json else str(summary)
            print(text, file=answer, flush=True)


@contextmanager
def _answer_only(as_json: bool) -> Iterator[TextIO]:
    """Keeps standard output for one JSON answer: everything else written there, even by libraries in C, to stderr."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        try:
            yield answer
        finally:
            sys.stdout.flush()
            os.dup2(answer.fileno(), 1)


def end_rank(body: Callable[[], None]) -> NoReturn:
    """Runs a rank's `body`, reports a failure, and ends this process.

    Signals have their default action, so that a start can be interrupted at any moment, however long C code takes. Once
    there is something to save, the run listens to them itself (`train.watch.stop`).
    """
    leave_to_system()
    code = reported(body)
    leave_exit_code(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: it waits for threads, and those of a rank that failed may be waiting for other ranks.
    os._exit(code)


def main() -> None:
    """Entry point of a rank's process."""
    parser = argparse.ArgumentParser(prog="python -m launch.local.rank")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    end_rank(lambda: run_rank(asked.config, asked.overrides, as_json=asked.json))


if __name__ == "__main__":
    main()
