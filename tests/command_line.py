"""Runs the real `engram` command: in this process, in warm ones or in fresh ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result

from launch.cli import main
from tests.warm_command import run_warm

_INSTALLED = Path(sys.executable).with_name("engram")
ENGRAM = [str(_INSTALLED)] if _INSTALLED.exists() else [sys.executable, "-m", "launch"]
"""The command; from a checkout where it is not installed."""
TIMEOUT_S = 240

JOB: dict[str, Any] = {
    "model": {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_layers": 2,
        "dense_hidden_size": 64,
        "attention": {"heads": 2, "kv_lora_rank": 16, "qk_nope_dim": 8, "qk_rope_dim": 8, "v_dim": 8},
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 16},
        "engram": {"layers": [0, 1], "heads": 2, "rows_per_head": 500, "row_dim": 4},
    },
    "data": {"sequence_length": 32, "validation_fraction": 0.2},
    "train": {"steps": 5, "global_batch_size": 8, "micro_batch_size": 4},
    "schedule": {"warmup_steps": 2},
    "offload": {"window_rows": 1500, "optimizer": {"untouched_rows": "exact"}},
    "eval": {"every": 2, "sequences": 8, "prompts": [], "sample_tokens": 0},
    "checkpoint": {"every": 5},
}
"""The `model`, `data`, ... sections of a job that trains in a second."""


def invoke(*arguments: object) -> Result:
    """Runs `engram` in this very process: for what starts no ranks and imports little."""
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="engram")


def assert_refused(result: Result, message: str) -> None:
    """A user's mistake was told in one line, with `message` in it, and nothing else."""
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.output
    assert message in result.stderr


def engram(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `engram` to its end in warm processes, or in fresh ones where ranks take GPUs.

    Never raises for its exit code.
    """
    if torch.cuda.is_available():
        return fresh_engram(*arguments, cwd=cwd, **environment)
    variables = {"OMP_NUM_THREADS": "1"} | environment
    return run_warm([*map(str, arguments)], cwd=cwd, timeout_s=TIMEOUT_S, environment=variables)


def fresh_engram(
    *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `engram` to its end as a user does: launcher and ranks are processes that import all they need."""
    return subprocess.run(
        [*ENGRAM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        check=False,
    )


def train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `engram train`, which must succeed."""
    result = engram("train", *arguments)
    assert result.returncode == 0, result.stderr + result.stdout
    return result


def write_job(folder: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """Writes the small job, with the given sections merged in, and returns its file."""
    job = json.loads(json.dumps(JOB)) | {"run": {"name": "small", "dir": str(folder / "runs")}}
    job["data"]["path"] = str(data)
    for name, values in sections.items():
        job[name] = job.get(name, {}) | values
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def losses(run: Path) -> list[tuple[float, float | None]]:
    """Loss and validation loss of every recorded step, as they were written."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record.get("val_loss")) for record in records]


def newest(run: Path) -> Any:
    """The newest checkpoint."""
    from train.checkpoint.listing import checkpoints_in
    from train.checkpoint.open import open_image

    return open_image(checkpoints_in(run / "checkpoints")[-1].path)


def table_rows(run: Path) -> dict[int, bytes]:
    """The newest checkpoint's table records, bit by bit, by row id."""
    rows: dict[int, bytes] = {}
    image = newest(run)
    for span in image.spans:
        ids, records, _ = image.rows(span)
        rows |= {row: record.numpy().tobytes() for row, record in zip(ids.tolist(), records, strict=True)}
    return rows


def backbone(run: Path) -> dict[str, bytes]:
    """The newest checkpoint's backbone, bit by bit, whatever ranks wrote it."""
    tensors: dict[str, bytes] = {}
    for name, _, values in newest(run).pieces(lambda *_: True):
        tensors[name] = tensors.get(name, b"") + values.numpy().tobytes()
    return tensors
