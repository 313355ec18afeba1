"""Part `job`: a whole training job with its tables in host memory, beside the same job with them on the device."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from launch.bench.measure import Spread
from launch.bench.options import BenchOptions
from launch.bench.progress import Progress
from launch.bench.report import Cell, Measure, Section
from train.errors import UserError
from train.metrics import METRICS_FILE, read_metrics

_LIMIT = 1.03
_MODES = ("window", "resident")


def measure_job(options: BenchOptions, progress: Progress) -> Section:
    """Trains the job of `options.job` in both modes, `options.runs` times each, in turns.

    Raises:
        UserError: the job cannot be trained; in the words of `engram train`.
    """
    progress.expect(options.runs * len(_MODES) * options.total_steps)
    step_ms: dict[str, list[float]] = {mode: [] for mode in _MODES}
    ratios = []
    for run in range(options.runs):
        medians = {}
        for mode in _MODES if run % 2 == 0 else _MODES[::-1]:
            taken = _train(options, mode)[options.warmup :]
            step_ms[mode] += taken
            medians[mode] = Spread.of(taken).median
            progress.advance(options.total_steps)
        ratios.append(medians["window"] / medians["resident"])
    base = Spread.of(step_ms["resident"]).median
    rows: list[dict[str, Cell]] = [
        {
            "offload.mode": mode,
            "step_ms": Spread.of(taken),
            "times_resident": Spread.of(taken).median / base if mode == "resident" else Spread.of(ratios),
        }
        for mode, taken in step_ms.items()
    ]
    return Section(
        f"{options.job}: a training step by where the tables are",
        rows,
        [Measure("step with offload, times resident", Spread.of(ratios).median, _LIMIT)],
        [f"{options.runs} run(s) of {options.total_steps} steps in each mode, in turns; ratios compare run by run"],
    )


def _train(options: BenchOptions, mode: str) -> list[float]:
    """Milliseconds of every step of a run."""
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        settings = {
            "run.dir": folder,
            "run.name": mode,
            "offload.mode": mode,
            "train.steps": options.total_steps,
            "train.log_every": 1,
            "eval.every": options.total_steps,
            "eval.sample_tokens": 0,
            "checkpoint.every": options.total_steps,
            "wandb.mode": "disabled",
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        command = [sys.executable, "-P", "-m", "launch.cli", "train", options.job, *overrides, "--json"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{options.job} (offload.mode={mode}): {told[-1].removeprefix('Error: ')}")
        return [record["step_ms"] for record in read_metrics(Path(json.loads(done.stdout)["run"], METRICS_FILE))]
