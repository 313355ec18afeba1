"""What the page tells of a run, read from its folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from train.config.file import load
from train.config.job import JobConfig
from train.report.metrics import METRICS_FILE, read_metrics
from train.report.skipped import SKIPPED_FILE
from train.run_folder import BASE_FILE, CONFIG_FILE
from train.status.status import Observed, RunStatus


@dataclass(frozen=True)
class ToldRun:
    """A run.

    Attributes:
        folder: of it.
        name: its folder's.
        number: among those of the page, from 0: its colour.
    """

    folder: Path
    number: int

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.folder.resolve().name

    @cached_property
    def job(self) -> JobConfig:
        """Its resolved config."""
        return load(self.folder / CONFIG_FILE, [], JobConfig)

    @cached_property
    def records(self) -> list[dict[str, float]]:
        """Those of metrics.jsonl."""
        path = self.folder / METRICS_FILE
        return read_metrics(path) if path.exists() else []

    @cached_property
    def skipped(self) -> list[dict[str, Any]]:
        """Steps that were not applied."""
        path = self.folder / SKIPPED_FILE
        return list(read_metrics(path)) if path.exists() else []

    @cached_property
    def status(self) -> RunStatus:
        """How it is, as `engram status` tells it."""
        return Observed(self.folder).look()

    @property
    def base(self) -> tuple[dict[str, Any], str]:
        """What its config would say by dotted key if it set nothing itself, and what that is called.

        The file that it extends, or the one that overrides were laid over, with the defaults below; of older runs,
        those alone.
        """
        known = defaults(JobConfig)
        path = self.folder / BASE_FILE
        if not path.exists():
            return known, "the defaults"
        base = yaml.safe_load(path.read_text(encoding="utf-8"))
        try:
            return flat(JobConfig.model_validate_json(json.dumps(base["values"]))), base["name"]
        except ValidationError:  # it is no job by itself
            return known | _flat(base["values"]), base["name"]

    def points(self, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
        """A number of the records that have it, by step."""
        return [(record["step"], scale * record[key]) for record in self.records if key in record]

    def last(self, key: str) -> float | None:
        """The newest value of a number."""
        return next((record[key] for record in reversed(self.records) if key in record), None)


def flat(config: BaseModel) -> dict[str, Any]:
    """Every value by its dotted key."""
    return _flat(config.model_dump(mode="json"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """What a config says if nobody says anything, by dotted key; of sections that have a default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found |= defaults(annotation, f"{prefix}{name}.")
        elif not field.is_required():
            value = field.get_default(call_default_factory=True)
            found[f"{prefix}{name}"] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return found
