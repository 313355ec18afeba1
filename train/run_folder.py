"""A run's folder, found without reading what is in it."""

from pathlib import Path

from train.errors import UserError

CONFIG_FILE = "config.yaml"
"""Name of the file with a run's resolved config."""
BASE_FILE = "base.yaml"
"""Name of the file with what the config was made from: `name` and `values` of its base."""
LOCK_FILE = ".lock"
"""Name of the file that a run at work has locked."""
LOG_FILE = "log.txt"
"""Name of the file with what a run reported."""
RUNS = "runs"
"""Folder in which a run is looked for by its name alone."""


def require_writable(folder: Path, *names: str) -> None:
    """Tries the existing files of a run that are written only in mid-run or at its end.

    Raises:
        OSError: one of them cannot be written.
    """
    for path in (folder / name for name in names):
        if path.exists():
            path.open("ab").close()


def find_run(run: str | Path) -> Path:
    """The folder that `run` is, or the one of that name in `runs`.

    Raises:
        UserError: neither is a run's.
    """
    for folder in (Path(run), Path(RUNS, run)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(f"{run}: not a run ({CONFIG_FILE} is missing), nor is {Path(RUNS, run)}; give a run's folder")
