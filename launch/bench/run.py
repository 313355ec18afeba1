"""Runs the parts of the benchmark that a user asked for."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from launch.bench.job import measure_job
from launch.bench.machine import describe_machine
from launch.bench.options import BenchOptions
from launch.bench.parts import PARTS
from launch.bench.progress import Progress
from launch.bench.report import Section
from launch.bench.trace_report import trace_sections
from launch.bench.training import measure_training
from launch.bench.worker import worker_command
from launch.local.start import run_ranks


def run_parts(names: Sequence[str], options: BenchOptions) -> dict[str, Section]:
    """Measures the named parts one after another, with progress on standard error.

    Raises:
        UserError: the machine's memory does not suffice, or the job file of part `job` or `train` cannot be trained.
        RankFailed: a measuring process crashed.
    """
    sections = {}
    for name in names:
        if name == "job":
            with Progress(name) as progress:
                sections[name] = measure_job(options, progress)
        elif name == "train":
            sections |= _training(options)
        else:
            sections[name] = reduce(Section.joined, [_on_ranks(name, options, count) for count in PARTS[name].ranks])
    return sections


def to_json(sections: dict[str, Section], options: BenchOptions) -> dict[str, Any]:
    """Everything that was measured, and how, as JSON can hold it."""
    return {
        "machine": describe_machine(options.threads),
        "options": options.to_json(),
        "parts": {name: section.to_json() for name, section in sections.items()},
    }


def _training(options: BenchOptions) -> dict[str, Section]:
    def keep(section: Section) -> None:
        if options.partial is not None:
            Path(options.partial).write_text(json.dumps(to_json({"train": section}, options)), encoding="utf-8")

    peak = _on_ranks("peak", options, 1)
    with Progress("train") as progress:
        sections = {"train": measure_training(options, peak, progress, keep)}
    return sections | (trace_sections(sorted(Path(options.traces).glob("*.json.gz"))) if options.traces else {})


def _on_ranks(name: str, options: BenchOptions, count: int) -> Section:
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        result = Path(folder, "section.json")
        options = options if PARTS[name].on_gpu else replace(options, device="cpu")
        gpus = 1 if options.device == "cuda" else 0
        run_ranks(worker_command(name, options, result), count, log_folder=Path(folder), gpus=gpus)
        return Section.from_json(json.loads(result.read_text(encoding="utf-8")))
