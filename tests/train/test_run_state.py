import os
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock

from train.errors import Interrupted, UserError
from train.run_folder import LOCK_FILE
from train.run_state import RunState, StateRecord, record_end


def ended(folder: Path, error: BaseException | None, *, active: bool = True) -> RunState | None:
    """The state of a run that did a step, saved it, and ended so."""
    record = StateRecord(folder, step=3, steps=9, saved=None, active=active)
    with suppress(BaseException), record:
        record.step = 4
        record.saved("checkpoints/step-00000004")
        if error:
            raise error
    return RunState.read(folder)


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (None, "finished", None),
        (Interrupted("by SIGTERM", 75), "interrupted", "by SIGTERM"),
        (UserError("train.steps: no"), "failed", "train.steps: no"),
        (RuntimeError("boom"), "failed", "RuntimeError: boom"),
    ],
)
def test_the_state_says_how_a_run_ended(
    error: BaseException | None, state: str, why: str | None, tmp_path: Path
) -> None:
    found = ended(tmp_path, error)
    assert found is not None
    assert (found.state, found.why, found.step, found.steps) == (state, why, 4, 9)
    assert (found.saved, found.pid) == ("checkpoints/step-00000004", os.getpid())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    assert ended(tmp_path, None, active=False) is None


def test_a_rank_that_is_killed_has_said_what_it_saved(tmp_path: Path) -> None:
    with StateRecord(tmp_path, step=3, steps=9, saved=None, active=True) as record:
        record.step = 4
        record.saved("checkpoints/step-00000004")
        found = RunState.read(tmp_path)
    assert found is not None
    assert (found.state, found.step, found.saved) == ("running", 4, "checkpoints/step-00000004")


def test_a_save_does_not_bring_an_ended_run_back(tmp_path: Path) -> None:
    with StateRecord(tmp_path, step=3, steps=9, saved=None, active=True) as record:
        record.end("interrupted", "at once")
        record.saved("checkpoints/step-00000003")
    found = RunState.read(tmp_path)
    assert found is not None
    assert (found.state, found.saved) == ("interrupted", None)


def test_the_first_end_counts(tmp_path: Path) -> None:
    with StateRecord(tmp_path, step=3, steps=9, saved=None, active=True) as record:
        record.end("interrupted", "at once")
    found = RunState.read(tmp_path)
    assert found is not None
    assert (found.state, found.why) == ("interrupted", "at once")


class TestALauncher:
    """Whose rank 0 left a state, and is gone."""

    def told(self, folder: Path) -> str | None:
        record_end(folder, "failed", "rank 1: out of memory")
        found = RunState.read(folder)
        return found and found.why

    def test_corrects_what_a_killed_rank_could_not_say(self, tmp_path: Path) -> None:
        RunState("running", 3, 9, parent=os.getpid()).write(tmp_path)
        assert self.told(tmp_path) == "rank 1: out of memory"

    def test_leaves_what_is_finished(self, tmp_path: Path) -> None:
        RunState("finished", 9, 9, parent=os.getpid()).write(tmp_path)
        assert self.told(tmp_path) is None

    def test_leaves_the_state_of_another_launcher(self, tmp_path: Path) -> None:
        RunState("running", 3, 9, parent=1).write(tmp_path)
        assert self.told(tmp_path) is None

    @pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"state": "running"}', b'{"step": 1, "lost": 2}'])
    def test_leaves_what_it_cannot_read(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "run.json").write_bytes(content)
        assert self.told(tmp_path) is None
        assert (tmp_path / "run.json").read_bytes() == content

    def test_leaves_a_run_that_is_at_work(self, tmp_path: Path) -> None:
        RunState("running", 3, 9, parent=os.getpid()).write(tmp_path)
        with FileLock(tmp_path / LOCK_FILE):
            assert self.told(tmp_path) is None

    def test_writes_nothing_where_no_run_was(self, tmp_path: Path) -> None:
        assert self.told(tmp_path) is None
        assert list(tmp_path.iterdir()) == []
