"""The command that measures the loop's own work counts what it should."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from offload.rows.updater import RowUpdater
from offload.window.admissions import Admissions
from offload.window.store import WindowStore
from tests.command_line import write_job
from tests.offload.window.loop_work import told, work_of_steps
from train.config.file import load
from train.config.job import JobConfig

BURNT_S = 0.02


def burning(function: Any) -> Any:
    """The function, after some processor time."""

    def burn(*args: Any, **kwargs: Any) -> Any:
        until = time.thread_time() + BURNT_S
        while time.thread_time() < until:
            pass
        return function(*args, **kwargs)

    return burn


@pytest.mark.parametrize(
    ("owner", "name", "counted"),
    [
        (WindowStore, "hold", {"begin", "acquire"}),
        (WindowStore, "release", {"apply", "finish"}),
        (RowUpdater, "read", set()),
        (Admissions, "release", {"window"}),
    ],
)
def test_work_is_the_threads_that_does_it(
    owner: type, name: str, counted: set[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, burning(getattr(owner, name)))
    (step,) = work_of_steps(load(str(write_job(tmp_path, corpus)), [], JobConfig), 1, 2)
    assert {name for name, taken in step.items() if name != "lost" and taken >= BURNT_S} == counted | {"rows"}


def test_it_tells_of_the_loops_thread_as_a_whole() -> None:
    text = told([Counter(begin=0.002, apply=0.001, acquire=0.0005, finish=0.0005, rows=7)])
    assert "of a step of 7 rows" in text
    assert "the loop's thread: 3.00 (3.00 to 3.00)" in text
