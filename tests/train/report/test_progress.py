import io

import pytest

from train.progress import duration
from train.report.metrics import OffloadMetrics, StepMetrics
from train.report.progress import RunProgress, step_line

OFFLOAD = OffloadMetrics(stall_ms=0.44, plan_ms=1.5, fetch_rows=7, hit_rate=0.812, writeback_rows=3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def metrics(step: int, offload: OffloadMetrics | None = OFFLOAD, val_loss: float | None = None) -> StepMetrics:
    return StepMetrics(step, 3.4119, 1.0, 1e-3, 512, 500.0, 5811.7, offload, val_loss)


def test_the_line() -> None:
    assert step_line(metrics(120), 300, 92.2) == (
        "step 120/300  loss 3.412  lr 1.0e-3  5,812 tokens/s  eta 1:32  stall 0.4 ms  hit 81.2 %"
    )
    assert step_line(metrics(20, None, 3.2), 300, 0) == (
        "step  20/300  loss 3.412  val 3.200  lr 1.0e-3  5,812 tokens/s  eta 0:00"
    )
    wild = StepMetrics(1, float("nan"), 1.0, 0.0, 512, 500.0, 5811.7)
    assert "loss nan  lr 0.0e0" in step_line(wild, 300, 0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (92, "1:32"), (7509, "2:05:09"), (273_600, "3d 04:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_off_a_terminal_every_logged_step_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream, log = io.StringIO(), io.StringIO()
    with RunProgress(300, stream=stream, log=log) as progress:
        progress.advance(1)
        progress.update(metrics(2))
        progress.message("checkpoint [bold]saved")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step   2/300  loss 3.412")
    assert lines[1] == "checkpoint [bold]saved"
    assert "\x1b" not in stream.getvalue()
    assert log.getvalue() == stream.getvalue()


def test_the_estimate_leaves_out_the_first_step_and_takes_in_all_pauses() -> None:
    clock = Clock()
    progress = RunProgress(110, start_step=9, stream=io.StringIO(), clock=clock)
    clock.now = 60.0
    progress.advance(10)
    assert progress.eta_s(0.5) == 50.0
    clock.now = 70.0
    progress.advance(20)
    assert progress.eta_s(0.5) == 90.0


def test_a_terminal_gets_a_bar_and_keeps_what_should_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal, log = Terminal(), io.StringIO()
    with RunProgress(300, stream=terminal, log=log) as progress:
        progress.update(metrics(120))
        progress.update(metrics(121, val_loss=3.25))
        progress.message("checkpoint saved")
    shown = terminal.getvalue()
    assert "━" in shown
    assert "step 120/300  loss 3.412" in shown
    assert shown.count("val 3.250") >= 1
    assert "checkpoint saved\n" in shown
    assert shown.endswith(("\n", "\x1b[?25h")), "the cursor must come back"
    assert [line.split("  ")[0] for line in log.getvalue().splitlines()] == [
        "step 120/300",
        "step 121/300",
        "checkpoint saved",
    ]


def test_at_80_columns_the_bar_keeps_loss_stall_and_hit_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with RunProgress(300, stream=terminal) as progress:
        progress.update(metrics(120))
    last = terminal.getvalue().rsplit("\x1b[2K", 1)[-1]
    assert "━" in last
    assert "step 120/300  loss 3.412  eta 1:30  stall 0.4 ms  hit 81.2 %" in last
    assert "…" not in last


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with RunProgress(300, stream=terminal) as progress:
        progress.update(metrics(1))
    assert len(terminal.getvalue().splitlines()) == 1
    assert "\x1b" not in terminal.getvalue()
