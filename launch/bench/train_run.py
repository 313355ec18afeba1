"""One run of `engram train`, for its figures."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from train.errors import UserError
from train.report.metrics import METRICS_FILE, read_metrics
from train.report.profile import TRACE_FILE

_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def train_run(
    job: str,
    steps: int,
    *,
    device: str,
    overrides: Sequence[str] = (),
    trace: Path | None = None,
    **settings: object,
) -> list[dict[str, float]]:
    """Trains a job in a folder of its own, without checkpoints, and returns what it recorded.

    Args:
        job: the job's file.
        steps: how many.
        device: `cpu` keeps a machine's GPUs out of it.
        overrides: more of them, as on the command line.
        trace: where the run's trace goes, if the settings ask for one.
        settings: overrides, with `__` for the dot in a key.

    Raises:
        UserError: the job cannot be trained; in the words of `engram train`.
    """
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        values = {
            "run.dir": folder,
            "run.name": "bench",
            "train.steps": steps,
            "train.log_every": 1,
            "eval.every": steps,
            "eval.sample_tokens": 0,
            "checkpoint.every": "null",
            "wandb.mode": "disabled",
        } | {key.replace("__", "."): value for key, value in settings.items()}
        chosen = [*overrides, *(f"{key}={value}" for key, value in values.items())]
        command = [sys.executable, "-P", "-m", "launch", "train", job, *chosen, "--json"]
        environment = {key: value for key, value in os.environ.items() if key not in _OF_A_RANK}
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
        )
        if done.returncode:
            told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            what = ", ".join(f"{key.replace('__', '.')}={value}" for key, value in settings.items())
            raise UserError(f"{job} ({what}): {told[-1].removeprefix('Error: ')}")
        run = Path(json.loads(done.stdout)["run"])
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(run / TRACE_FILE, trace)
        return read_metrics(run / METRICS_FILE)
