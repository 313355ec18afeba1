"""Predicted against measured on this machine's CPU: `python -m tests.launch.plan.predictions [CASE ...] [--write]`.

Measures the machine (`engram plan --calibrate`), trains small jobs on one and two ranks behind emulated links, and puts
what `plan` says of them beside it: medians of the last steps, a rank's memory beyond that of one that trains next to
nothing, and what share of the cores other work took meanwhile. CASE chooses some: `tiny`, `tiny,none` or `tiny,none,2`.
`--hardware FILE` takes what was calibrated before. `--write` keeps the rows in docs/plan.md, with those of other cases
that are there. All take about ten minutes. Ends with status 1 if a case misses a goal of `tests.launch.plan.compared`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import psutil

from launch.plan.assessment import assess
from launch.plan.cluster import Cluster
from launch.plan.hardware import read_catalogue
from tests.launch.plan.compared import Case, Compared, Found, table, told, written
from tests.launch.plan.scale_page import DOCS, put
from train.config.file import load
from train.config.job import JobConfig
from train.data.preparation.corpus import default_corpus

PAGE, MARK = DOCS / "plan.md", "predictions"
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
    Case(shape, link, ranks)
    for shape, link in (
        ("tiny", "none"),
        ("tiny", "20 MB/s"),
        ("wide", "none"),
        ("medium", "none"),
        ("memory", "20 MB/s"),
        ("tiny", "100 MB/s"),
    )
    for ranks in (1, 2)
]
NOTHING = ("model.hidden_size=16", "model.dense_hidden_size=16", "model.num_layers=2", "model.moe=null",
           "model.attention={heads: 1, kv_lora_rank: 16, qk_nope_dim: 16, qk_rope_dim: 16, v_dim: 16}",
           "train.micro_batch_size=1")  # fmt: skip
NO_TABLE = (*NOTHING, "model.engram=null")
LEAST_TABLE = (*NOTHING, "offload.window_rows=100", "model.engram.layers=[1]", "model.engram.orders=[2]",
               "model.engram.heads=1", "model.engram.rows_per_head=64", "model.engram.row_dim=4")  # fmt: skip
ELSEWHERE = "processes"  # what a process takes in any case
TINY = str(DOCS.parent / "configs/tiny.yaml")


@cache
def text() -> Path:
    """The default corpus: named as a store, `plan` replays it."""
    return default_corpus(DOCS.parent / "data", bpe_vocab=load(TINY, (), JobConfig).data.bpe_vocab).absolute()


def settings(*overrides: str) -> list[str]:
    quiet = [f"train.steps={STEPS}", "train.log_every=1", "eval.every=1000", "checkpoint.every=null", "offload.depth=1",
             "eval.sequences=16", "eval.sample_tokens=0", f"data.path={text()}"]  # fmt: skip
    return [*quiet, *overrides]


def measured(overrides: list[str], ranks: int) -> tuple[Found, float]:
    """What a run of them takes, and the share of the machine's cores that anything else took meanwhile."""
    others = OtherWork()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch", "train", TINY, *overrides, f"run.dir={folder}", f"run.nproc={ranks}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=DOCS.parent, env=environment)
        lines = [json.loads(line) for line in (Path(folder) / "tiny/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_ms" in line][-COUNTED:]
    step, stall = (statistics.median(line.get(key, 0.0) for line in steps) for key in ("step_ms", "offload.stall_ms"))
    return Found(step, stall, steps[-1]["memory.host_bytes"] / 2**20), others.share()


class OtherWork:
    """What other processes have taken of this machine since this was made."""

    def __init__(self) -> None:
        self._before = self._now()

    def share(self) -> float:
        """Of all cores."""
        busy, children, seconds = (now - then for now, then in zip(self._now(), self._before, strict=True))
        return max(0.0, busy - children) / (seconds * (os.cpu_count() or 1))

    def _now(self) -> tuple[float, float, float]:
        times, mine = psutil.cpu_times(), resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(times) - times.idle - times.iowait, mine.ru_utime + mine.ru_stime, time.monotonic()


def predicted(overrides: list[str], ranks: int, numbers: Path) -> Found:
    """The same by `plan`: of a processor, the device's memory is the host's."""
    catalogue = read_catalogue(numbers)
    cluster = Cluster(1, ranks, catalogue.gpu("here"), None, "here")
    found = assess(load(TINY, overrides, JobConfig), cluster, counted=COUNTED)
    here = found.device.parts, {name: value / ranks for name, value in found.host.parts.items()}
    memory = sum(value for parts in here for name, value in parts.items() if name != ELSEWHERE)
    return Found(1e3 * found.seconds, 1e3 * found.time.stages.stall(1), memory / 2**20)


def compared(case: Case, numbers: Path, idle: dict[tuple[str, ...], float]) -> Compared:
    """One case; `idle` keeps what a rank takes that trains next to nothing, with a table and without."""
    asked = settings(*SHAPES[case.shape], *LINKS[case.link])
    least = NO_TABLE if "model.engram=null" in asked else LEAST_TABLE
    if least not in idle:
        idle[least] = measured(settings(*least), 1)[0].memory
    took, others = measured(asked, case.ranks)
    beyond = took._replace(memory=took.memory - idle[least])
    return Compared(case, predicted(asked, case.ranks, numbers), beyond, others)


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases of these names, all for none."""
    found = [case for case in CASES if not names or any(case.named(name) for name in names)]
    if unknown := [name for name in names if not any(case.named(name) for case in CASES)]:
        raise SystemExit(f"no case {unknown[0]!r}; there are {', '.join(map(str, CASES))}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.launch.plan.predictions")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="some: SHAPE, SHAPE,LINK or SHAPE,LINK,RANKS")
    parser.add_argument("--hardware", type=Path, metavar="FILE", help="calibrated before, or else now into that file")
    parser.add_argument("--write", action="store_true", help="keep the rows in docs/plan.md")
    asked = parser.parse_args()
    cases = chosen(asked.cases)
    rows: list[Compared] = []
    idle: dict[tuple[str, ...], float] = {}
    with tempfile.TemporaryDirectory() as folder:
        numbers = asked.hardware or Path(folder, "here.yaml")
        if not numbers.exists():
            subprocess.run([sys.executable, "-m", "launch", "plan", "--calibrate", str(numbers)], check=True)
        for case in cases:
            rows.append(compared(case, numbers, idle))
            print(rows[-1].row(), flush=True)
    if asked.write:
        page = PAGE.read_text()
        kept = {row.case: row for row in written(page, MARK)} | {row.case: row for row in rows}
        PAGE.write_text(put(page, MARK, table([kept[case] for case in CASES if case in kept], len(CASES))))
    print("\n".join(told(rows)), flush=True)
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
