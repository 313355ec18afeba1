"""`run.json` in a run's folder: whether the run is at work, has finished, was interrupted, or failed and why."""

import datetime
import json
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Any, Literal, Self

from filelock import Timeout

from train.errors import Interrupted, UserError
from train.files import lock_file, new_file
from train.run_folder import LOCK_FILE

STATE_FILE = "run.json"
"""Name of the file in a run's folder."""


State = Literal["running", "finished", "interrupted", "failed"]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunState:
    """See the attributes.

    Attributes:
        state: if `running` although nobody holds the lock of the folder, rank 0 was killed, and its launcher as well.
        step: steps that were done when the state was written; when it is `running`, at the start or the newest save.
        steps: of the whole run.
        saved: newest checkpoint that the run has written or continued from; None if there is none.
        why: it was interrupted or failed; one line or a traceback.
        look_ahead: that `offload.depth=auto` chose; None if it chose none yet, or the config names one.
        host, pid, parent: of the process that writes it, rank 0 or one of its node, and of what started that.
        started, written: times, UTC, ISO 8601.
        ranks: of the run; None in what older versions wrote.
        machine: of rank 0, as `train.hardware` describes it; empty in what older versions wrote.
    """

    state: State
    step: int
    steps: int
    saved: str | None = None
    why: str | None = None
    look_ahead: int | None = None
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    parent: int = field(default_factory=os.getppid)
    started: str = field(default_factory=_now)
    written: str = field(default_factory=_now)
    ranks: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The state of a run; None if it has none, or none that can be read."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json((folder / STATE_FILE).read_bytes(), strict=True)
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, folder: Path) -> Self:
        """Puts it into the run's folder, whole or not at all; returns what was written."""
        now = replace(self, written=_now())
        with new_file(folder / STATE_FILE) as partial:
            partial.write_text(json.dumps(asdict(now), indent=1) + "\n", encoding="utf-8")
        return now


class StateRecord:
    """The state of a run at work, as a context manager: `running` inside, then how it ended.

    Attributes:
        step: kept up to date by whoever knows; written with the next save, and at the end.

    Args:
        folder: of the run.
        step: steps that are done.
        steps: of the whole run.
        saved: the checkpoint that it continues from; None for none.
        active: whether this rank writes it, rank 0 or one of each node; the others write nothing.
        ranks: of the run.
        machine: as in `RunState`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        steps: int,
        saved: str | None,
        active: bool,
        ranks: int | None = None,
        machine: dict[str, Any] | None = None,
    ) -> None:
        self._folder, self._active, self.step = folder, active, step
        self._state = RunState("running", step, steps, saved, ranks=ranks, machine=machine or {})
        self._writing = RLock()  # a signal's handler may end the run while its own thread writes

    def __enter__(self) -> Self:
        if self._active:
            self._state.write(self._folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.end("finished")
        elif isinstance(error, Interrupted):
            self.end("interrupted", str(error))
        else:
            known = isinstance(error, UserError)
            self.end("failed", str(error) if known else f"{type(error).__name__}: {error}")

    def saved(self, checkpoint: str) -> None:
        """Writes that there is a checkpoint: a rank that is killed later can say nothing any more."""
        with self._writing:
            self._state = replace(self._state, step=self.step, saved=checkpoint)
            if self._active:
                self._write(self._state)

    def chose(self, look_ahead: int) -> None:
        """Writes the look-ahead that was chosen."""
        with self._writing:
            self._state = replace(self._state, step=self.step, look_ahead=look_ahead)
            if self._active:
                self._write(self._state)

    @property
    def look_ahead(self) -> int | None:
        """See `RunState`."""
        return self._state.look_ahead

    def end(self, state: State, why: str | None = None) -> None:
        """Writes how the run ended, if the disk takes it; of several ends the first counts. From any thread."""
        with self._writing:
            if self._active:
                self._active = False
                self._write(replace(self._state, state=state, step=self.step, why=why))

    def _write(self, state: RunState) -> None:
        with suppress(OSError):  # what happened is reported in any case
            state.write(self._folder)


def record_end(folder: Path, state: State, why: str) -> None:
    """For a launcher whose ranks are gone: corrects what rank 0 could not know, or not say any more.

    A run that others have at work, and a state that the launcher's own rank 0 did not leave, stay as they are.
    """
    try:
        found = RunState.read(folder)
        if found is None or (found.host, found.parent) != (platform.node(), os.getpid()):
            return
        with lock_file(folder / LOCK_FILE).acquire(timeout=0):
            if found.state in ("running", "failed"):
                replace(found, state=state, why=why).write(folder)
    except (Timeout, OSError):
        return  # what ended the ranks is reported all the same
