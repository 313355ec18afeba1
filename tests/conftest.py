"""What many tests need: Triton's interpreter where there is no GPU, a small prepared corpus of real text, a run on it.

What takes long to make is made once by each worker, which tests a file whole (Makefile: --dist loadfile).
"""

import gc
import os
import sysconfig
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.command_line import engram, train, write_job

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is defined, so before any is. It changes nothing else: no public function hands CPU tensors
    # to a kernel.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Nothing of what is imported and collected can be freed: pytest_collection_finish goes on.
gc.disable()

# Time says nothing of an example: first calls compile, and other tests run beside.
settings.register_profile("engram", deadline=None)
settings.load_profile("engram")

MODULES = ("argparse", "ast", "bisect", "configparser", "csv", "dataclasses", "difflib", "functools", "gzip", "heapq")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten modules of the standard library, prepared by the real command with a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [stdlib / f"{name}.py" for name in MODULES]
    result = engram("data", "prepare", *sources, "--out", folder, "--train-bpe", "300")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that two ranks trained, with checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    sections = {"train": {"steps": 6}, "optimizer": {"learning_rate": 0.01}, "checkpoint": {"every": 3}}
    train(write_job(folder, corpus, **sections), "--nproc", "2")
    return folder / "runs" / "small"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips files that need DeepSpeed where it is not installed: kernels and tables are tested without it."""
    report = yield
    if report.failed and "No module named 'deepspeed'" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: needs DeepSpeed")
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `long` unless `-m` names it: not by a `-m` of our own, which a user's would replace.

    What needs a GPU stays: it takes long in Triton's interpreter alone.
    """
    if "long" in config.option.markexpr:
        return
    left_out = {item for item in items if item.get_closest_marker("long") and not item.get_closest_marker("gpu")}
    config.hook.pytest_deselected(items=[*left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Collections from now on need not visit all that is imported and collected."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs a CUDA device")
