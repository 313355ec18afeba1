"""TensorBoard beside a run: imported only when asked for, and never the reason why training stops."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
"""Folder, in that of the run, with its event files."""
_log = logging.getLogger(__name__)


class TensorBoardLog:
    """Writes every number of a record as a scalar. What goes wrong becomes one warning, after which it does nothing.

    Args:
        folder: of the run.
        resumed_step: what event files of earlier starts have of later steps is hidden.
    """

    def __init__(self, folder: Path, *, resumed_step: int = 0) -> None:
        self._writer: Any = None
        self._guard(lambda: self._start(folder, resumed_step))

    def _start(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=resumed_step + 1)

    def log(self, metrics: Mapping[str, float]) -> None:
        """Writes one line of metrics; `step` among them is the horizontal axis."""
        writer = self._writer
        if writer is not None:
            self._guard(lambda: _write(writer, metrics))

    def close(self, exit_code: int = 0) -> None:
        """Writes what is still to be written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._guard(writer.close)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._writer = None
            hint = "; pip install 'engram-pretrain[tensorboard]'" if isinstance(error, ImportError) else ""
            told = " ".join(f"{type(error).__name__}: {error}".split())
            _log.warning("tensorboard is off for the rest of this run, training goes on: %s%s", told, hint)


def _write(writer: Any, metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if name != "step":
            # A slash makes a section of what a dot groups in metrics.jsonl.
            writer.add_scalar(name.replace(".", "/"), value, metrics["step"])
