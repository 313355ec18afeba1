"""`skipped.jsonl` in a run's folder: the steps that were not applied, why, and what their batches were."""

import json
import os
from pathlib import Path
from typing import Any

from train.report.metrics import read_metrics, truncate

SKIPPED_FILE = "skipped.jsonl"
"""Name of the file in a run's folder."""


class SkippedSteps:
    """Appends a record for each; first removes those of steps after `resumed_step`. Use it on one rank only."""

    def __init__(self, folder: str | os.PathLike[str], *, resumed_step: int = 0) -> None:
        path = Path(folder) / SKIPPED_FILE
        truncate(path, resumed_step)
        self.count = len(read_metrics(path)) if path.exists() else 0
        """Steps of the whole run that were not applied."""
        self._path = path

    def add(self, step: int, why: str, loss: float, grad_norm: float, batch: dict[str, Any]) -> None:
        """One more; it is in the file when this returns."""
        self.count += 1
        record = {"step": step, "why": why, "loss": loss, "grad_norm": grad_norm, **batch}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
