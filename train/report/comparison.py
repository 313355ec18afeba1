"""Runs side by side, finished or not, seeds of the same job together."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from train.config.file import load
from train.config.job import JobConfig
from train.errors import UserError
from train.report.metrics import METRICS_FILE, read_metrics
from train.report.summary import SUMMARY_FILE, Summary
from train.run_folder import CONFIG_FILE, find_run

_LOSS, _BITS = "val_loss", "val_bits_per_byte"


class Spread(NamedTuple):
    """One figure over the seeds: its mean, and how far it spreads."""

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of one or more values."""
        found = list(values)
        return cls(fmean(found), min(found), max(found))


@dataclass(frozen=True)
class ComparedRun:
    """A run, or as much of it as there is.

    Attributes:
        name: its folder's.
        job: its resolved config.
        figures: as `train.report.summary.Summary` names them; of an unfinished run, those that are known.
        records: those of metrics.jsonl that have a validation loss, by step.
        finished: whether `figures` are of its end.
    """

    name: str
    job: JobConfig
    figures: dict[str, Any]
    records: dict[int, dict[str, float]]
    finished: bool

    @classmethod
    def open(cls, run: str | Path) -> "ComparedRun":
        """Reads a run's folder, or the one of that name in `runs`.

        Raises:
            UserError: there is none, it was never evaluated, or its summary is damaged or of another version.
        """
        folder = find_run(run)
        job, figures = load(folder / CONFIG_FILE, [], JobConfig), _figures(folder)
        records = _evaluations(folder)
        # It may be an earlier end, if the run continues to more steps: the config is today's.
        finished = figures is not None and figures["steps"] == job.train.steps
        if not finished and not records:
            raise UserError(f"{folder}: not finished, and not evaluated yet; wait for step {job.eval.every}")
        return cls(folder.resolve().name, job, figures or {}, records, finished)

    def at(self, step: int) -> "ComparedRun":
        """The run as it was after a step that it was evaluated after."""
        record = self.records[step]
        found = {_LOSS: record[_LOSS], _BITS: record.get(_BITS), "tokens": record["tokens"], "steps": step}
        return replace(self, figures=self.figures | found)

    @property
    def setup(self) -> dict[str, Any]:
        """What seeds of the same job have in common."""
        return self.job.model_dump(exclude={"run": True, "train": {"seed"}})

    @property
    def validated_on(self) -> dict[str, Any]:
        """What decides the validation tokens, as far as a config does."""
        keys = {"path", "mix", "sequence_length", "validation_fraction"}
        later = [phase.mix for phase in self.job.data.phases if phase.mix]
        return self.job.data.model_dump(include=keys) | {"sequences": self.job.eval.sequences, "later": later}


def open_runs(runs: Iterable[str | Path]) -> tuple[list[ComparedRun], int | None]:
    """The runs, and the step that they are compared at: None for the end of each, if all are finished.

    Otherwise the last step after which all of them were evaluated.

    Raises:
        UserError: as `ComparedRun.open`, or there is no such step.
    """
    found = [ComparedRun.open(run) for run in runs]
    if all(run.finished for run in found):
        return found, None
    shared = set.intersection(*({*run.records} for run in found))
    if not shared:
        last = ", ".join(f"{run.name} {max(run.records, default=0)}" for run in found)
        raise UserError(
            f"no step after which all runs were evaluated (their last: {last}); wait, or give them the same eval.every"
        )
    step = max(shared)
    return [run.at(step) for run in found], step


def _evaluations(folder: Path) -> dict[int, dict[str, float]]:
    path = folder / METRICS_FILE
    records = read_metrics(path) if path.exists() else []
    return {int(record["step"]): record for record in records if _LOSS in record and "tokens" in record}


def _figures(folder: Path) -> dict[str, Any] | None:
    try:
        summary = Summary.read(folder)
    except ValueError as error:
        raise UserError(
            f"{folder / SUMMARY_FILE}: damaged ({error}); engram train {folder / CONFIG_FILE} writes it again"
        ) from None
    if summary is None:
        return None
    if summary.val_loss is None or summary.val_bits_per_byte is None:
        raise UserError(f"{folder}: no loss to compare, as it has no validation text (data.validation_fraction)")
    return asdict(summary)


@dataclass(frozen=True)
class Contender:
    """Runs whose configs are equal up to name, place and seed, of different seeds."""

    runs: dict[int, ComparedRun]
    """By seed."""

    @cached_property
    def name(self) -> str:
        """What the names of its runs begin with."""
        names = [run.name for run in self.runs.values()]
        if len(names) == 1:
            return names[0]
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        return "".join(letters[0] for letters in alike).rstrip("-_.") or names[0]

    def figure(self, key: str) -> Any:
        """A figure that does not depend on the seed; None where no run's end has told it."""
        return next((run.figures[key] for run in self.runs.values() if key in run.figures), None)

    def spread(self, key: str) -> Spread | None:
        """A figure that does, over all seeds; None where it is not known."""
        values = [run.figures[key] for run in self.runs.values()]
        return None if None in values else Spread.of(values)

    def gap(self, key: str, to: "Contender") -> Spread | None:
        """How far a figure lies above that of `to`, seed by seed: the same seed means the same order of the data.

        None if the two have no seed in common, and for `self`.
        """
        shared = self.runs.keys() & to.runs.keys()
        if to is self or not shared:
            return None
        return Spread.of(self.runs[seed].figures[key] - to.runs[seed].figures[key] for seed in shared)


def contenders(runs: Iterable[ComparedRun]) -> list[Contender]:
    """Groups runs, in the order of each group's first.

    Raises:
        UserError: two runs do not differ, or losses cannot be compared as the validation tokens differ.
    """
    found: list[Contender] = []
    setups: list[dict[str, Any]] = []
    for run in runs:
        if run.setup not in setups:
            setups.append(run.setup)
            found.append(Contender({}))
        seeds = found[setups.index(run.setup)].runs
        if (other := seeds.setdefault(run.job.train.seed, run)) is not run:
            raise UserError(f"{run.name} and {other.name}: the same job with the same seed; leave one of them out")
    first = found[0]
    for each in found[1:]:
        if not _same_tokens(first, each):
            raise UserError(
                f"{first.name} and {each.name}: validated on different tokens, so their losses cannot be compared; "
                "give both the same data, data.sequence_length and eval.sequences"
            )
    return found


def _same_tokens(first: Contender, other: Contender) -> bool:
    entropies = {each.figure("unigram_entropy") for each in (first, other)}
    if None not in entropies:
        # No two texts have the same entropy in all bits: it stands for the tokens that the loss was taken over.
        return len(entropies) == 1
    mine, theirs = (next(iter(each.runs.values())).validated_on for each in (first, other))
    return mine == theirs
