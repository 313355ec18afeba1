import sys
from pathlib import Path

import pytest

from train.report.metrics import METRICS_FILE, MetricsLog, StepMetrics, read_metrics


def log_steps(folder: Path, resumed_step: int, last: int) -> None:
    with MetricsLog(folder, resumed_step=resumed_step, tensorboard=True) as log:
        for step in range(resumed_step + 1, last + 1):
            log.log(StepMetrics(step, 3.5 - step, 1.0, 1e-3, 512, 20.0, 25_000.0, extra={"stages.plan_ms": 2.0}))


def test_two_starts_are_one_history(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_steps(tmp_path, 0, 4)
    log_steps(tmp_path, 2, 5)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [
        (step, 3.5 - step) for step in (1, 2, 3, 4, 5)
    ]
    assert "stages/plan_ms" in found.Tags()["scalars"]
    assert "step" not in found.Tags()["scalars"]


def test_without_tensorboard_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    log_steps(tmp_path, 0, 2)
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 2
    (record,) = caplog.records
    assert "pip install 'engram-pretrain[tensorboard]'" in record.getMessage()


def test_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    log_steps(tmp_path, 0, 2)
    assert len(caplog.records) == 1
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 2
