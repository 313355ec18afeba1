"""Processes that need not import torch and DeepSpeed: forked, for one pytest process, from one that has done it once.

Such a process differs from a fresh one in what the C library and the interpreter read at their start: the settings of
malloc and the seed of `hash`, which all of them share.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]


def warm_context() -> ForkServerContext:
    """Where warm processes and what connects them come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "tests.preloaded"])
    # With more threads than one, a fork is unsafe.
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": _with_root()}
    with patch.dict(os.environ, environment):
        forkserver.ensure_running()
    return context


def warm_process(target: Callable[..., None], *args: Any, **environment: str) -> ForkServerProcess:
    """A warm process, not yet started, that calls `target(*args)` in this process's environment and `environment`."""
    return warm_context().Process(target=_call, args=(dict(os.environ) | environment, target, args))


def _with_root() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _call(environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
