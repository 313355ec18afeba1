"""`engram bench all`: every part within a given time, each in a process of its own, whatever becomes of the others."""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import IO, Any

from launch.bench.report import Section

_GRACE_S = 10.0
_STARTING_S = 10.0  # of a process, before it measures
_LATE = 1.5  # times its share, after which a part is ended
_LEAST_S = 5.0
_LAST_WORD_S = 1.0

_SMALL_OFFLOAD = ("--lookups", "65536", "--rows", "500000", "--steps", "8", "--warmup", "3")
_SMALL_TRAIN = ("--steps", "6", "--warmup", "4")


@dataclass(frozen=True)
class Share:
    """A part and its share of the time.

    Attributes:
        name: a command of `engram bench`.
        weight: of the part, among all.
        on_gpu, on_cpu: its options there.
        limited: whether it takes `--seconds`.
    """

    name: str
    weight: float
    on_gpu: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()
    limited: bool = True


SHARES = (
    Share("kernels", 0.2),
    Share("links", 0.15),
    Share("offload", 0.15, (), _SMALL_OFFLOAD, limited=False),
    Share("train", 0.5, ("--steps", "20", "--warmup", "10"), _SMALL_TRAIN),
)
"""The parts in the order in which they run. What one leaves of its share, the later ones have more."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Attributes:
        seconds: that it took.
        answer: what its command printed, as JSON; None if it did not succeed.
        reason: why it did not.
    """

    seconds: float
    answer: dict[str, Any] | None
    reason: str | None = None


def run_everything(minutes: float, device: str, more: dict[str, tuple[str, ...]] | None = None) -> dict[str, Outcome]:
    """Runs all parts one after another, with their progress on standard error. No part's failure is an error.

    Args:
        minutes: that all may take.
        device: `cpu` or `cuda`.
        more: further options, by part.
    """
    ends = time.monotonic() + 60 * minutes
    outcomes = {}
    for number, share in enumerate(SHARES):
        left = ends - time.monotonic()
        mine = left * share.weight / sum(later.weight for later in SHARES[number:])
        if mine < _LEAST_S:
            outcomes[share.name] = Outcome(0.0, None, f"left out: {mine:.0f} s are left for it")
            continue
        command = [sys.executable, "-P", "-m", "launch.cli", "bench", share.name, "--device", device, "--json"]
        command += share.on_gpu if device == "cuda" else share.on_cpu
        if share.limited:
            command += ["--seconds", f"{max(1.0, mine - _STARTING_S):.0f}"]
        command += (more or {}).get(share.name, ())
        print(f"{share.name}: about {mine:.0f} s", file=sys.stderr, flush=True)
        outcomes[share.name] = run_command(command, min(left, _LATE * mine))
    return outcomes


def run_command(command: list[str], seconds: float) -> Outcome:
    """Runs one part; a part that takes longer is ended, with all that it started."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as answers:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=answers, stderr=subprocess.PIPE, text=True)
        told = _Told(process.stderr)
        late = not _ended(process, seconds)
        told.join()
        taken = time.monotonic() - started
        if late:
            return Outcome(taken, None, f"ended: it took longer than {seconds:.0f} s")
        if process.returncode:
            return Outcome(taken, None, f"failed: {told.last or f'exit code {process.returncode}'}")
        answers.seek(0)
        return Outcome(taken, json.load(answers))


def sections_of(outcome: Outcome) -> dict[str, Section]:
    """The sections of a part that succeeded."""
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
    """All answers in one, as JSON can hold it."""
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
    """Passes on what a process says on standard error, and keeps its last word."""

    def __init__(self, stream: IO[str] | None) -> None:
        self.last = ""
        self._stream = stream
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Waits for the end of what it says; not for ever, as something that it started may hold on to the stream."""
        self._thread.join(_LAST_WORD_S)

    def _pass_on(self) -> None:
        for line in self._stream or ():
            sys.stderr.write(line)
            sys.stderr.flush()
            if line.strip():
                self.last = line.strip().removeprefix("Error: ")
