"""What a tuning has measured so far, in a file, so that it can go on after it was interrupted."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from launch.tune.points import Point
from launch.tune.turns import Turn
from train.files import new_file

RESULTS_FILE = "tune.json"
"""Name of the file in a tuning's folder."""


@dataclass
class Results:
    """See the attributes.

    Attributes:
        job: digest of everything that measurements depend on: config, ranks, machine, kind of search.
        start: the configured point, with the engine that `auto` means here; None before anything was measured.
        best: the point to take, as far as is known; None likewise.
        points: of the first stage, the look-aheads and windows.
        shard_rows: of the largest shard.
        turns: what was measured, in its order.
        seconds: that all of it took.
        finished: whether nothing was left to measure; else the time was over.
    """

    job: str
    start: Point | None = None
    best: Point | None = None
    points: list[Point] = field(default_factory=list)
    shard_rows: int = 0
    turns: list[Turn] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @classmethod
    def read(cls, folder: Path, job: str) -> "Results":
        """What is in the folder, if it is of this job; else nothing measured."""
        try:
            found = TypeAdapter(cls).validate_json((folder / RESULTS_FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            return cls(job)
        return found if found.job == job else cls(job)

    def write(self, folder: Path) -> None:
        """Puts it into the folder, whole or not at all."""
        with new_file(folder / RESULTS_FILE) as partial:
            partial.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)
