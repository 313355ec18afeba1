"""Runs the parts of the benchmark that a user asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from launch.bench.machine import describe_machine
from launch.bench.options import BenchOptions
from launch.bench.path import measure_path
from launch.bench.progress import Progress
from launch.bench.report import Section
from train.errors import UserError

Part = Callable[[BenchOptions, Progress], Section]

PARTS: dict[str, Part] = {"path": measure_path}
"""The parts by their name on the command line."""


def run_parts(names: Sequence[str], options: BenchOptions) -> dict[str, Section]:
    """Measures the named parts, with progress on standard error.

    Raises:
        UserError: the machine's memory does not suffice.
    """
    torch.set_num_threads(options.threads)
    sections = {}
    with Progress() as progress:
        for name in names:
            progress.begin(name)
            try:
                sections[name] = PARTS[name](options, progress)
            except ValueError as error:
                raise UserError(str(error)) from None
    return sections


def to_json(sections: dict[str, Section], options: BenchOptions) -> dict[str, Any]:
    """Everything that was measured, and how, as JSON can hold it."""
    workload = {name: value for name, value in vars(options.workload).items() if not name.startswith("_")}
    settings = {name: value for name, value in vars(options).items() if name != "workload"}
    return {
        "machine": describe_machine(options.threads),
        "workload": workload,
        "settings": settings,
        "parts": {name: section.to_json() for name, section in sections.items()},
    }
