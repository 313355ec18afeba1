"""`engram bench all`: every part within a given time, each in its own process, so that none depends on the others."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launch.bench.report import Section

_GRACE_S = 10.0
_STARTING_S = 10.0  # of a process, before it measures
_LATE = 1.5  # times its share, after which a part is ended
_KEPT = 0.95  # of the later parts' shares, which a late part may not take
_LEAST_S = 5.0
_LAST_WORD_S = 1.0

_SMALL_OFFLOAD = ("--lookups", "65536", "--rows", "500000", "--steps", "8", "--warmup", "3")
_SMALL_TRAIN = ("--steps", "4", "--warmup", "2")


@dataclass(frozen=True)
class Share:
    """A part and its share of the time.

    Attributes:
        name: a command of `engram bench`.
        weight: its part of all shares.
        on_gpu, on_cpu: its options there.
        limited: whether it takes `--seconds`.
        keeps: whether it takes `--partial`, a file with what it found so far.
    """

    name: str
    weight: float
    on_gpu: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()
    limited: bool = True
    keeps: bool = False


SHARES = (
    Share("links", 0.1),
    Share("kernels", 0.2),
    Share("offload", 0.1, (), _SMALL_OFFLOAD, limited=False),
    Share("train", 0.6, ("--steps", "10", "--warmup", "4", "--rounds", "3"), _SMALL_TRAIN, keeps=True),
)
"""The parts in the order in which they run, short ones first. What one leaves of its share is for the later ones."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one part.

    Attributes:
        seconds: the time it took.
        answer: what its command printed, as JSON; if it failed, what it had found so far, or None.
        reason: why it failed.
    """

    seconds: float
    answer: dict[str, Any] | None
    reason: str | None = None


def run_everything(
    minutes: float,
    device: str,
    more: dict[str, tuple[str, ...]] | None = None,
    names: Sequence[str] = (),
    so_far: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
) -> dict[str, Outcome]:
    """Runs all parts one after another, with their progress on standard error. No part's failure is an error.

    Args:
        minutes: the time that all may take.
        device: `cpu` or `cuda`.
        more: further options, by part.
        names: the parts to run; empty for all.
        so_far: called with the outcomes after every part.
    """
    ends = time.monotonic() + 60 * minutes
    outcomes: dict[str, Outcome] = {}
    shares = [share for share in SHARES if not names or share.name in names]
    for number, share in enumerate(shares):
        left = ends - time.monotonic()
        mine = left * share.weight / sum(later.weight for later in shares[number:])
        most = min(_LATE * mine, left - _KEPT * (left - mine))
        outcomes[share.name] = _run_share(share, device, mine, most, (more or {}).get(share.name, ()))
        so_far(outcomes)
    return outcomes


def _run_share(share: Share, device: str, mine: float, most: float, more: tuple[str, ...]) -> Outcome:
    if mine < _LEAST_S:
        return Outcome(0.0, None, f"left out: {mine:.0f} s are left for it")
    command = [sys.executable, "-P", "-m", "launch", "bench", share.name, "--device", device, "--json"]
    command += share.on_gpu if device == "cuda" else share.on_cpu
    if share.limited:
        command += ["--seconds", f"{max(1.0, mine - _STARTING_S):.0f}"]
    print(f"{share.name}: about {mine:.0f} s", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        partial = Path(folder, "partial.json") if share.keeps else None
        command += ["--partial", str(partial)] if partial else []
        return run_command([*command, *more], most, partial)


def run_command(command: list[str], seconds: float, partial: Path | None = None) -> Outcome:
    """Runs one part; one that takes too long is ended, with everything that it started.

    Args:
        command: prints its answer as JSON.
        seconds: the time it may take.
        partial: the file in which it keeps what it found so far.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as answers:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=answers, stderr=subprocess.PIPE, text=True)
        told = _Told(process.stderr)
        late = not _ended(process, seconds)
        told.join()
        taken = time.monotonic() - started
        if late or process.returncode:
            why = f"failed: {told.last or f'exit code {process.returncode}'}"
            why = f"ended: it took longer than {seconds:.0f} s" if late else why
            return Outcome(taken, _found_so_far(partial), why)
        answers.seek(0)
        return Outcome(taken, json.load(answers))


def _found_so_far(partial: Path | None) -> dict[str, Any] | None:
    # If the part was ended while writing it, it may be cut off.
    with suppress(OSError, json.JSONDecodeError):
        return json.loads(partial.read_text(encoding="utf-8")) if partial else None
    return None


def sections_of(outcome: Outcome) -> dict[str, Section]:
    """The sections of a part, as far as it got."""
    parts = outcome.answer["parts"] if outcome.answer else {}
    return {name: Section.from_json(saved) for name, saved in parts.items()}


def summary(outcomes: dict[str, Outcome]) -> Section:
    """Which parts ran, how long, and why the others did not."""
    return Section(
        "Parts",
        [
            {"part": name, "seconds": outcome.seconds, "status": outcome.reason or "measured"}
            for name, outcome in outcomes.items()
        ],
    )


def to_json(outcomes: dict[str, Outcome], machine: dict[str, Any], minutes: float, device: str) -> dict[str, Any]:
    """All answers in one JSON object."""
    parts = {
        name: {
            "seconds": outcome.seconds,
            "status": outcome.reason or "measured",
            "options": outcome.answer["options"] if outcome.answer else None,
            "sections": outcome.answer["parts"] if outcome.answer else {},
        }
        for name, outcome in outcomes.items()
    }
    return {"machine": machine, "options": {"minutes": minutes, "device": device}, "parts": parts}


def _ended(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the process ended by itself in time; otherwise ends it, first with a signal that it passes on."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return False
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return True


class _Told:
    """Passes on what a process writes to standard error, and keeps its last line."""

    def __init__(self, stream: IO[str] | None) -> None:
        self.last = ""
        self._stream = stream
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the end of the output; not for ever, as something that the process started may keep it open."""
        self._thread.join(_LAST_WORD_S)

    def _pass_on(self) -> None:
        for line in self._stream or ():
            sys.stderr.write(line)
            sys.stderr.flush()
            if line.strip():
                self.last = line.strip().removeprefix("Error: ")
