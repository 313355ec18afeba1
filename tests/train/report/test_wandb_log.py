import logging
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from train.config.report import WandbConfig
from train.report.metrics import METRICS_FILE, MetricsLog, StepMetrics, read_metrics
from train.report.wandb_log import WandbLog


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 3.5, 1.0, 1e-3, 512, 20.0, 25_000.0)


class Fake(ModuleType):
    """Stands for wandb; raises in the function named by `fails`, hangs in the one named by `hangs`."""

    def __init__(self, fails: str = "", hangs: str = "") -> None:
        super().__init__("wandb")
        self.fails, self.hangs = fails, hangs
        self.calls: list[str] = []
        self.settings: dict[str, object] = {}
        self.run = SimpleNamespace(
            define_metric=lambda *args, **kwargs: None,
            log=lambda record: self.call("log"),
            finish=lambda exit_code: self.call("finish"),
        )

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.hangs:
            threading.Event().wait(30)
        if name == self.fails:
            raise SystemExit(f"{name} went\nwrong")

    def Settings(self, **settings: object) -> None:
        self.settings = settings

    def teardown(self) -> None:
        self.calls.append("teardown")

    def init(self, **arguments: object) -> SimpleNamespace:
        self.call("init")
        self.settings = arguments
        return self.run


@pytest.mark.parametrize(("fails", "calls"), [("init", ["init"]), ("log", ["init", "log"])])
def test_a_failing_wandb_warns_once_and_training_goes_on(
    fails: str,
    calls: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake = Fake(fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsLog(tmp_path, wandb=WandbConfig(mode="online"), name="a") as log:
        for step in range(1, 4):
            log.log(metrics(step))
    assert fake.calls == calls
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"SystemExit: {fails} went wrong" in caplog.text
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 3


def test_a_failure_at_the_end_is_a_warning_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", Fake("finish"))
    with MetricsLog(tmp_path, wandb=WandbConfig(mode="online")) as log:
        log.log(metrics(1))
    assert len(caplog.records) == 1


def test_a_hanging_wandb_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = Fake(hangs="log")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = WandbLog(WandbConfig(mode="online"), tmp_path, name="a", job={}, timeout_s=0.1)
    log.log({"step": 1})
    log.log({"step": 2})
    log.close()
    assert fake.calls == ["init", "log"]
    assert "no answer within 0.1 s" in caplog.text


def test_a_missing_wandb_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    WandbLog(WandbConfig(mode="offline"), tmp_path, name="a", job={}).log({"step": 1})
    assert len(caplog.records) == 1


def test_a_resumed_job_continues_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    ids = []
    for _ in range(2):
        with MetricsLog(tmp_path, wandb=WandbConfig(mode="online", name="b"), name="a"):
            ids.append(fake.settings["id"])
    assert ids[0] == ids[1]
    assert (fake.settings["name"], fake.settings["resume"]) == ("b", "allow")
    other = tmp_path / "other"
    other.mkdir()
    with MetricsLog(other, wandb=WandbConfig(mode="online")):
        assert fake.settings["id"] != ids[0]


def test_wandb_is_not_imported_unless_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, train.report.metrics as m\n"
        f"with m.MetricsLog({str(tmp_path)!r}) as log: log.log(m.StepMetrics(1, 1., 1., 1., 1, 1., 1.))\n"
        "sys.exit('wandb' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_what_wandb_keeps_until_the_interpreter_ends_is_gone_when_the_run_does(tmp_path: Path) -> None:
    temporary, run = tmp_path / "temporary", tmp_path / "run"
    temporary.mkdir()
    run.mkdir()
    code = (
        "import os, sys; from pathlib import Path; from train.config.report import WandbConfig\n"
        "from train.report.wandb_log import WandbLog\n"
        "log = WandbLog(WandbConfig(mode='offline'), Path(sys.argv[1]), name='a', job={})\n"
        "log.log({'step': 1, 'loss': 2.0}); log.close()\n"
        "os._exit(0)"  # as ranks do
    )
    environment = os.environ | {"TMPDIR": str(temporary)}
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, env=environment)
    assert list(run.glob("wandb/offline-run-*"))
    assert list(temporary.iterdir()) == []
    assert not (run / "wandb" / "temporary").exists()


def test_a_real_offline_run_holds_the_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    with MetricsLog(tmp_path, wandb=WandbConfig(mode="offline"), name="real", job={"train": {"steps": 2}}) as log:
        log.log(metrics(1))
        log.log(metrics(2))
    assert caplog.records == []
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # wandb's own process writes the file, on a busy machine some time after the run was finished.
    deadline = time.monotonic() + 60
    while b"tokens_per_s" not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"tokens_per_s" in content
    assert b"real" in content
