"""The warm ranks that other tests use."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks


def who() -> tuple[int, int, torch.Tensor]:
    total = torch.ones(1)
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total


def test_ranks_are_processes_that_are_joined() -> None:
    (first, one, total), (second, other, _) = run_ranks(who, 2)
    assert (first, second, total.item()) == (0, 1, 2.0)
    assert len({one, other, os.getpid()}) == 3


def threads_of_the_server() -> list[str]:
    return [thread.name for thread in Path(f"/proc/{os.getppid()}/task").iterdir()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux")
def test_ranks_are_forked_from_one_thread() -> None:
    assert len(run_ranks(threads_of_the_server, 1)[0]) == 1


def variable() -> str | None:
    return os.environ.get("A_VARIABLE")


def test_ranks_are_in_the_environment_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(variable, 1) == [None]
    monkeypatch.setenv("A_VARIABLE", "1")
    assert run_ranks(variable, 1) == ["1"]


def one_leaves_its_pid(folder: Path, ending: str) -> None:
    """Rank 0 hangs where no peer's end wakes it, rank 1 ends."""
    if dist.get_rank() == 0:
        (folder / "part").write_text(str(os.getpid()))
        (folder / "part").rename(folder / "pid")
        time.sleep(600)
    while not (folder / "pid").exists():
        time.sleep(0.01)
    if ending == "exit":
        os._exit(3)
    if ending == "raise":
        raise RuntimeError("what rank 1 met")
    time.sleep(600)


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        ("raise", r"rank 1 failed:\n(?s:.*)one_leaves_its_pid(?s:.*)what rank 1 met"),
        ("exit", "rank 1 failed:\nit ended without a result"),
        ("hang", r"ranks \[0, 1\] were not done in time"),
    ],
)
def test_a_failure_is_told_and_hanging_ranks_are_ended(tmp_path: Path, ending: str, told: str) -> None:
    before = time.monotonic()
    with pytest.raises(AssertionError, match=told):
        run_ranks(one_leaves_its_pid, 2, tmp_path, ending, timeout_s=5 if ending == "hang" else 600)
    assert time.monotonic() - before < 120
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
