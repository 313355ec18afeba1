"""Runs the parts of the benchmark that a user asked for."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

from launch.bench.options import BenchOptions
from launch.bench.parts import PARTS
from launch.bench.report import Section
from launch.bench.trace.report import trace_sections
from launch.bench.worker import worker_command
from launch.local.environment import rank_count, visible_gpus
from launch.local.start import run_ranks
from train.config.file import load
from train.config.job import JobConfig


def run_parts(names: Sequence[str], options: BenchOptions) -> dict[str, Section]:
    """Measures the named parts one after another, with progress on standard error.

    Raises:
        UserError: the machine's memory does not suffice, or the job of part `train` cannot be trained.
        RankFailed: a measuring process crashed.
    """
    sections = {}
    for name in names:
        counts = (_job_ranks(options),) if PARTS[name].trains else PARTS[name].ranks
        sections[name] = reduce(Section.joined, [_on_ranks(name, options, count) for count in counts])
        if PARTS[name].trains and options.traces:
            sections |= trace_sections(sorted(Path(options.traces).glob("*.json.gz")))
    return sections


def _job_ranks(options: BenchOptions) -> int:
    run = load(options.job, options.overrides, JobConfig).run
    return rank_count(run.nproc, visible_gpus() if options.device == "cuda" else 0)


def _on_ranks(name: str, options: BenchOptions, count: int) -> Section:
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        result = Path(folder, "section.json")
        options = options if PARTS[name].on_gpu else replace(options, device="cpu")
        gpus = count if options.device == "cuda" else 0
        run_ranks(worker_command(name, options, result), count, log_folder=Path(folder), gpus=gpus)
        return Section.from_json(json.loads(result.read_text(encoding="utf-8")))
