"""Weights & Biases beside a run: imported only when asked for, and never the reason why training stops."""

import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.config.report import WandbConfig

ID_FILE = "wandb-id"
"""Name of the file in a run's folder with the id under which it is continued."""
_INIT_TIMEOUT_S = 30
_log = logging.getLogger(__name__)


class WandbLog:
    """One Weights & Biases run, continued under the same id when the job is resumed.

    Whatever wandb raises, or if it does not answer for `timeout_s` seconds, becomes one warning, after which this
    object does nothing.
    """

    def __init__(
        self, config: WandbConfig, folder: Path, *, name: str, job: Mapping[str, Any], timeout_s: float = 60.0
    ) -> None:
        self._run: Any = None
        self._timeout_s = timeout_s
        self._temporary = folder / "wandb" / "temporary"
        if config.mode != "disabled":
            self._guard(lambda: self._start(config, folder, config.name or name, job))

    def _start(self, config: WandbConfig, folder: Path, name: str, job: Mapping[str, Any]) -> None:
        with _temporary_files_in(self._temporary):
            import wandb

        self._run = wandb.init(
            mode=config.mode,
            project=config.project,
            entity=config.entity,
            name=name,
            id=_run_id(folder),
            resume="allow",
            dir=folder,
            config=dict(job),
            settings=wandb.Settings(console="off", silent=True, init_timeout=_INIT_TIMEOUT_S),
        )
        # wandb's own step must never go back, ours does when a run resumes from an earlier checkpoint.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float]) -> None:
        """Sends one line of metrics; `step` among them is the horizontal axis."""
        run = self._run
        if run is not None:
            self._guard(lambda: run.log(dict(metrics)))

    def close(self, exit_code: int = 0) -> None:
        """Ends the run and waits for what is still to be sent, but no longer than the timeout."""
        run, self._run = self._run, None
        if run is not None:
            self._guard(lambda: _finish(run, exit_code))
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _guard(self, action: Callable[[], None]) -> None:
        """Runs `action` where it can neither raise into training nor hold it up for longer than the timeout."""
        failure: list[str] = [f"no answer within {self._timeout_s:g} s"]

        def attempt() -> None:
            try:
                action()
                failure.clear()
            except BaseException as error:
                failure[0] = f"{type(error).__name__}: {error}"

        thread = threading.Thread(target=attempt, name="wandb", daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if failure:
            self._run = None
            _log.warning("wandb is off for the rest of this run, training goes on: %s", " ".join(failure[0].split()))


def _finish(run: Any, exit_code: int) -> None:
    import wandb

    run.finish(exit_code=exit_code)
    # Ends wandb's own process, which removes its files; the interpreter's end, as of which it would, never comes.
    wandb.teardown()


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Where wandb makes folders that it removes when the interpreter ends, as that of a rank never does."""
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _run_id(folder: Path) -> str:
    """The id kept in the run's folder, made at its first start."""
    path = folder / ID_FILE
    if not path.exists() or not path.read_bytes().strip():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
