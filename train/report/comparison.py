"""Finished runs side by side, seeds of the same job together."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from train.config.file import load
from train.config.job import JobConfig
from train.errors import UserError
from train.report.summary import SUMMARY_FILE, Summary
from train.run_folder import CONFIG_FILE, find_run


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
class FinishedRun:
    """A run that has ended.

    Attributes:
        name: its folder's.
        job: its resolved config.
        figures: of its summary, as `train.report.summary.Summary` names them.
    """

    name: str
    job: JobConfig
    figures: dict[str, Any]

    @classmethod
    def open(cls, run: str | Path) -> "FinishedRun":
        """Reads a run's folder, or the one of that name in `runs`.

        Raises:
            UserError: there is none, it has not ended, or its summary is damaged or of another version.
        """
        folder = find_run(run)
        figures, job = _figures(folder), load(folder / CONFIG_FILE, [], JobConfig)
        if figures["steps"] != job.train.steps:
            # It continues to more steps: the config is today's, the summary that of an earlier end.
            raise UserError(
                f"{folder}: not finished ({SUMMARY_FILE} is of {figures['steps']} steps, {CONFIG_FILE} of "
                f"{job.train.steps}); let its training end"
            )
        return cls(folder.resolve().name, job, figures)

    @property
    def setup(self) -> dict[str, Any]:
        """What seeds of the same job have in common."""
        return self.job.model_dump(exclude={"run": True, "train": {"seed"}})


def _figures(folder: Path) -> dict[str, Any]:
    try:
        summary = Summary.read(folder)
    except ValueError as error:
        raise UserError(
            f"{folder / SUMMARY_FILE}: damaged ({error}); engram train {folder / CONFIG_FILE} writes it again"
        ) from None
    if summary is None:
        raise UserError(f"{folder}: not finished ({SUMMARY_FILE} is missing); let its training end")
    if summary.val_loss is None or summary.val_bits_per_byte is None:
        raise UserError(f"{folder}: no loss to compare, as it has no validation text (data.validation_fraction)")
    return asdict(summary)


@dataclass(frozen=True)
class Contender:
    """Runs whose configs are equal up to name, place and seed, of different seeds."""

    runs: dict[int, FinishedRun]
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
        """A figure that does not depend on the seed."""
        return next(iter(self.runs.values())).figures[key]

    def spread(self, key: str) -> Spread:
        """A figure that does, over all seeds."""
        return Spread.of(run.figures[key] for run in self.runs.values())

    def gap(self, key: str, to: "Contender") -> Spread | None:
        """How far a figure lies above that of `to`, seed by seed: the same seed means the same order of the data.

        None if the two have no seed in common, and for `self`.
        """
        shared = self.runs.keys() & to.runs.keys()
        if to is self or not shared:
            return None
        return Spread.of(self.runs[seed].figures[key] - to.runs[seed].figures[key] for seed in shared)


def contenders(runs: Iterable[FinishedRun]) -> list[Contender]:
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
        # No two texts have the same entropy in all bits: it stands for the tokens that the loss was taken over.
        if each.figure("unigram_entropy") != first.figure("unigram_entropy"):
            raise UserError(
                f"{first.name} and {each.name}: validated on different tokens, so their losses cannot be compared; "
                "give both the same data, data.sequence_length and eval.sequences"
            )
    return found
