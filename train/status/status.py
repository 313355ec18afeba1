"""How a run is: what its folder says of its state, its newest numbers, its checkpoints and its ranks."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from train.checkpoint.listing import CHECKPOINTS, checkpoints_in
from train.progress import duration
from train.report.metrics import METRICS_FILE, read_metrics
from train.run_state import RunState
from train.status.pulse import SILENT_S, Life, Pulse

Condition = Literal["not started", "starting", "running", "lost", "finished", "interrupted", "failed"]
"""`lost`: it died without a word. The others as in `train.run_state`."""
_TAIL_BYTES = 1 << 20
"""Of metrics.jsonl that are read: thousands of records."""
_PACE_RECORDS = 20


@dataclass(frozen=True)
class RunStatus:
    """How a run is.

    Attributes:
        run: its folder.
        state: see `Condition`.
        why: how it came to that, in words; None where there is nothing to say.
        step, steps: done, and to be done in all.
        metrics: the newest record of metrics.jsonl, with the newest of what not every record has.
        eta_s: seconds of the steps that are left, at the pace of the last ones; None unless it runs.
        saved_step, saved_age_s: of the newest checkpoint that can be seen from here, and seconds since.
        ranks: of the run, if known.
        lives: those whose heartbeats can be seen from here.
        host, pid, started: of the start of the run that wrote its state last; ISO 8601.
        machine: of its rank 0; empty where an older version wrote it.
    """

    run: str
    state: Condition
    why: str | None = None
    step: int = 0
    steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    eta_s: float | None = None
    saved_step: int | None = None
    saved_age_s: float | None = None
    ranks: int | None = None
    lives: list[Life] = field(default_factory=list)
    host: str | None = None
    pid: int | None = None
    started: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        """Whether it may still change by itself."""
        return self.state in ("starting", "running")

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return asdict(self)


class Observed:
    """A run under observation.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._pulse = folder, Pulse(folder)

    def look(self, *, well: bool = False) -> RunStatus:
        """How it is; with `well`, ranks that seem silent get a few seconds to give a sign of life."""
        told = RunState.read(self._folder)
        records = self._records()
        saved = checkpoints_in(self._folder / CHECKPOINTS)[-1:]
        common: dict[str, Any] = {
            "run": str(self._folder),
            "metrics": _newest(records),
            "saved_step": saved[0].step if saved else None,
            "saved_age_s": max(0.0, time.time() - saved[0].path.stat().st_mtime) if saved else None,
        }
        if told is None:
            return RunStatus(state="not started", **common)
        common |= {"steps": told.steps, "ranks": told.ranks}
        common |= {"host": told.host, "pid": told.pid, "started": told.started, "machine": told.machine}
        if told.state != "running":
            return RunStatus(state=told.state, why=told.why, step=told.step, **common)
        lives = (self._pulse.look_well if well else self._pulse.look)(told.ranks)
        done = max([told.step, *(int(record["step"]) for record in records[-1:]), *(_done(life) for life in lives)])
        state, why = _condition(lives, self._state_age_s())
        eta_s = _pace_s(records) * (told.steps - done) if state == "running" and records else None
        return RunStatus(state=state, why=why, step=done, eta_s=eta_s, lives=lives, **common)

    def _records(self) -> list[dict[str, float]]:
        path = self._folder / METRICS_FILE
        return read_metrics(path, last_bytes=_TAIL_BYTES) if path.exists() else []

    def _state_age_s(self) -> float:
        return time.time() - (self._folder / "run.json").stat().st_mtime


def _done(life: Life) -> int:
    return max(0, life.beat.step - 1)


def _newest(records: Iterable[dict[str, float]]) -> dict[str, float]:
    """The last record, with the last of what only some have: an evaluation's."""
    newest: dict[str, float] = {}
    for record in records:
        if "val_loss" in record:
            newest["val_step"] = record["step"]
        newest |= record
    return newest


def _pace_s(records: list[dict[str, float]]) -> float:
    last = [record["step_ms"] for record in records[-_PACE_RECORDS:] if "step_ms" in record]
    return sum(last) / len(last) / 1000 if last else 0.0


def _condition(lives: list[Life], state_age_s: float) -> tuple[Condition, str | None]:
    """Whether a run that never said how it ended is at work, from the ranks that can be seen."""
    if not lives:
        if state_age_s <= SILENT_S:
            return "starting", None
        return "lost", f"no rank has a heartbeat here, {duration(state_age_s)} after the run wrote its state"
    silent = [life for life in lives if life.silent]
    told = "; ".join(_told(host, list(group)) for host, group in groupby(sorted(silent, key=_host), key=_host))
    return "lost" if len(silent) == len(lives) else "running", told or None


def _host(life: Life) -> str:
    return life.beat.host


def _told(host: str, lives: list[Life]) -> str:
    last = min(lives, key=lambda life: life.age_s)
    return (
        f"{host}: no heartbeat of {rank_list([life.beat.rank for life in lives])} for {duration(last.age_s)}, "
        f"last seen in step {last.beat.step}, {last.beat.stage}"
    )


def rank_list(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 0-3, 6`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' * (len(ranks) > 1)} {parts}"
