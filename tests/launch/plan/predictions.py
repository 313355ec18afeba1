"""Predicted against measured on this machine's CPU: `python -m tests.launch.plan.predictions [--write]`.

Measures the machine (`engram plan --calibrate`), trains small jobs on one and two ranks behind emulated links, and puts
what `plan` says of them beside it: medians of the last steps, and a rank's memory beyond that of one that trains
next to nothing. `--write` keeps the table in docs/plan.md. Some minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from launch.plan.assessment import assess
from launch.plan.cluster import Cluster
from launch.plan.hardware import read_catalogue
from tests.launch.plan.scale_page import DOCS, put
from train.config.file import load
from train.config.job import JobConfig

STEPS, COUNTED = 24, 12
SHAPES = {
    "tiny": (),
    "wide": ("model.engram=null", "model.hidden_size=384", "model.dense_hidden_size=1024", "model.moe=null"),
    "medium": ("model.hidden_size=256", "train.micro_batch_size=4"),
    "memory": ("model.moe=null", "model.engram.heads=8", "offload.window_rows=90000"),
}
LINKS = {"none": (), "100 MB/s": ("offload.emulate_link.bytes_per_second=1.0e+8",),
         "20 MB/s": ("offload.emulate_link.bytes_per_second=2.0e+7",)}  # fmt: skip
CASES = [
    ("tiny", "none"),
    ("tiny", "20 MB/s"),
    ("wide", "none"),
    ("medium", "none"),
    ("memory", "20 MB/s"),
    ("tiny", "100 MB/s"),
]
NOTHING = ("model.hidden_size=16", "model.dense_hidden_size=16", "model.num_layers=2", "model.moe=null",
           "model.attention={heads: 1, kv_lora_rank: 16, qk_nope_dim: 16, qk_rope_dim: 16, v_dim: 16}",
           "train.micro_batch_size=1")  # fmt: skip
NO_TABLE = (*NOTHING, "model.engram=null")
LEAST_TABLE = (*NOTHING, "offload.window_rows=100", "model.engram.layers=[1]", "model.engram.orders=[2]",
               "model.engram.heads=1", "model.engram.rows_per_head=64", "model.engram.row_dim=4")  # fmt: skip
ELSEWHERE = ("cuda", "processes")  # what a GPU and its process take in any case
TINY = str(DOCS.parent / "configs/tiny.yaml")


class Found(NamedTuple):
    """Milliseconds of a step and of its stall; MiB of a rank."""

    step: float
    stall: float
    memory: float


def settings(*overrides: str) -> list[str]:
    quiet = [f"train.steps={STEPS}", "train.log_every=1", "eval.every=1000", "checkpoint.every=null", "offload.depth=1",
             "eval.sequences=16", "eval.sample_tokens=0"]  # fmt: skip
    return [*quiet, *overrides]


def measured(overrides: list[str], ranks: int) -> Found:
    """What a run of them takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch", "train", TINY, *overrides, f"run.dir={folder}", f"run.nproc={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=DOCS.parent, env=environment)
        lines = [json.loads(line) for line in (Path(folder) / "tiny/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_ms" in line][-COUNTED:]
    step, stall = (statistics.median(line.get(key, 0.0) for line in steps) for key in ("step_ms", "offload.stall_ms"))
    return Found(step, stall, steps[-1]["memory.host_bytes"] / 2**20)


def predicted(overrides: list[str], ranks: int, numbers: Path) -> Found:
    """The same by `plan`: of a processor, the device's memory is the host's."""
    catalogue = read_catalogue(numbers)
    found = assess(load(TINY, overrides, JobConfig), Cluster(1, ranks, catalogue.gpu("here"), None, "here"))
    here = found.device.parts, {name: value / ranks for name, value in found.host.parts.items()}
    memory = sum(value for parts in here for name, value in parts.items() if name not in ELSEWHERE)
    return Found(1e3 * found.seconds, 1e3 * found.time.stages.stall(1), memory / 2**20)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder, "here.yaml")
        subprocess.run([sys.executable, "-m", "launch", "plan", "--calibrate", str(numbers)], check=True)
        rows = ["| shape | link | ranks | step, predicted | measured | off | stall, predicted | measured | memory, "
                "predicted | measured | off |", "|---|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        idle = {least: measured(settings(*least), 1).memory for least in (NO_TABLE, LEAST_TABLE)}
        for shape, link in CASES:
            for ranks in (1, 2):
                asked = settings(*SHAPES[shape], *LINKS[link])
                says, took = predicted(asked, ranks, numbers), measured(asked, ranks)
                memory = took.memory - idle[NO_TABLE if "model.engram=null" in asked else LEAST_TABLE]
                # fmt: off
                rows.append(f"| {shape} | {link} | {ranks} | {says.step:.0f} ms | {took.step:.0f} ms | "
                            f"{says.step / took.step - 1:+.0%} | {says.stall:.0f} ms | {took.stall:.0f} ms | "
                            f"{says.memory:.0f} MiB | {memory:.0f} MiB | {says.memory / memory - 1:+.0%} |")
                # fmt: on
                print(rows[-1], flush=True)
    if "--write" in sys.argv:
        page = DOCS / "plan.md"
        page.write_text(put(page.read_text(), "predictions", "\n".join(rows)))


if __name__ == "__main__":
    main()
