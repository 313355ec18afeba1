"""Writes a launch's folder: the code that will run, the resolved config, the launcher's files."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from launch.cluster.layout import CONFIG, Launch
from train.config.file import dump
from train.errors import UserError

_ROOT = Path(__file__).parents[2]
_ROOMS = ("kernels", "model", "offload", "train", "launch")


def write(launch: Launch, files: Mapping[str, str]) -> None:
    """Makes the launch's folder, with what its ranks run and `files` by name.

    Raises:
        UserError: another launch took the folder meanwhile, or it cannot be written.
    """
    try:
        launch.folder.mkdir(parents=True)
        if launch.code:
            for room in _ROOMS:
                shutil.copytree(_ROOT / room, launch.code / room, ignore=shutil.ignore_patterns("__pycache__"))
        dump(launch.job, launch.folder / CONFIG)
        for name, text in files.items():
            path = launch.folder / name
            path.write_text(text, encoding="utf-8")
            if path.suffix == ".sh":
                path.chmod(0o755)
    except FileExistsError:
        raise UserError(f"{launch.folder}: another launch of this run has just taken it; try again") from None
    except OSError as error:
        raise UserError(f"{launch.folder}: cannot write the launch's files ({error.strerror})") from None
