"""Predicted against measured on this machine's CPU: `python -m tests.launch.plan.predictions [--write]`.

Measures the machine (`engram plan --calibrate`), trains small jobs on one and two ranks behind emulated links, and puts
what `plan` says of them beside it: medians of the last steps. `--write` keeps the table in docs/plan.md. Some minutes.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

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
TINY = str(DOCS.parent / "configs/tiny.yaml")


def settings(shape: str, link: str) -> list[str]:
    quiet = [f"train.steps={STEPS}", "train.log_every=1", "eval.every=1000", "checkpoint.every=null", "offload.depth=1",
             "eval.sequences=16", "eval.sample_tokens=0"]  # fmt: skip
    return [*quiet, *SHAPES[shape], *LINKS[link]]


def measured(overrides: list[str], ranks: int) -> tuple[float, float]:
    """Milliseconds of a step, and of its stall."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch", "train", TINY, *overrides, f"run.dir={folder}", f"run.nproc={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=DOCS.parent, env=environment)
        lines = [json.loads(line) for line in (Path(folder) / "tiny/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_ms" in line][-COUNTED:]
    return tuple(statistics.median(line.get(key, 0.0) for line in steps) for key in ("step_ms", "offload.stall_ms"))


def predicted(overrides: list[str], ranks: int, numbers: Path) -> tuple[float, float]:
    """The same by `plan`."""
    catalogue = read_catalogue(numbers)
    found = assess(load(TINY, overrides, JobConfig), Cluster(1, ranks, catalogue.gpu("here"), None, "here"))
    return 1e3 * found.seconds, 1e3 * found.time.stages.stall(1)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder, "here.yaml")
        subprocess.run([sys.executable, "-m", "launch", "plan", "--calibrate", str(numbers)], check=True)
        rows = ["| shape | link | ranks | step, predicted | measured | off | stall, predicted | measured |",
                "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for shape, link in CASES:
            for ranks in (1, 2):
                says, stall = predicted(settings(shape, link), ranks, numbers)
                took, waited = measured(settings(shape, link), ranks)
                rows.append(f"| {shape} | {link} | {ranks} | {says:.0f} ms | {took:.0f} ms | {says / took - 1:+.0%} | "
                            f"{stall:.0f} ms | {waited:.0f} ms |")  # fmt: skip
                print(rows[-1], flush=True)
    if "--write" in sys.argv:
        page = DOCS / "plan.md"
        page.write_text(put(page.read_text(), "predictions", "\n".join(rows)))


if __name__ == "__main__":
    main()
