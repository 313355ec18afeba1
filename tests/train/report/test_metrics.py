import json
import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from train.report.metrics import METRICS_FILE, MetricsLog, OffloadMetrics, StepMetrics, read_metrics


def metrics(step: int, loss: float = 3.5, **more: object) -> StepMetrics:
    return StepMetrics(step, loss, 1.25, 1e-3, 512 * step, 20.5, 25_000.0, **more)  # type: ignore[arg-type]


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_a_record_has_the_keys_that_others_read(tmp_path: Path) -> None:
    offload = OffloadMetrics(stall_ms=0.5, plan_ms=1.5, fetch_rows=7, hit_rate=0.75, writeback_rows=3)
    with MetricsLog(tmp_path) as log:
        log.log(metrics(1, offload=offload))
        log.log(metrics(2, val_loss=3.25, extra={"moe.dead_experts": 1}))
    first, second = read_metrics(tmp_path / METRICS_FILE)
    plain = ["step", "loss", "grad_norm", "lr", "tokens", "step_ms", "tokens_per_s"]
    assert list(first) == [
        *plain,
        "offload.stall_ms",
        "offload.plan_ms",
        "offload.fetch_rows",
        "offload.hit_rate",
        "offload.writeback_rows",
    ]
    assert list(second) == [*plain, "val_loss", "moe.dead_experts"]
    assert (first["tokens"], first["offload.fetch_rows"], second["val_loss"]) == (512, 7, 3.25)


@given(st.floats(width=32) | st.floats())
def test_losses_keep_their_bits(loss: float) -> None:
    read = json.loads(json.dumps(metrics(1, loss).record()))["loss"]
    assert np.float64(read).tobytes() == np.float64(loss).tobytes() or math.isnan(loss)


def test_a_record_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(metrics(1))
        assert steps(tmp_path) == [1]


def test_resuming_drops_later_steps_and_what_a_crash_tore(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(metrics(step, loss=1 / step))
    before = (tmp_path / METRICS_FILE).read_text().splitlines()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'\n\xff{"step": 2}\n\xfe\xff\n[2]\n{"step": "2"}\n{"step": true}\n')
    with MetricsLog(tmp_path, resumed_step=3) as log:
        log.log(metrics(4))
    after = (tmp_path / METRICS_FILE).read_text().splitlines()
    assert after[:3] == before[:3], "what is kept must not change by a digit"
    assert steps(tmp_path) == [1, 2, 3, 4]
    with MetricsLog(tmp_path):
        assert steps(tmp_path) == []


def test_records_that_were_lost_are_told(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    with MetricsLog(tmp_path, resumed_step=4, every=2) as log:
        assert log.notes == [f"{path} is not there: it begins after step 4"]
    with MetricsLog(tmp_path) as log:
        assert log.notes == []
        for step in (2, 4):
            log.log(metrics(step))
    for resumed_step, told in ((4, []), (5, []), (6, [f"{path}: there is no record of the steps from 5 to 6"])):
        with MetricsLog(tmp_path, resumed_step=resumed_step, every=2) as log:
            assert log.notes == told
    path.write_text(path.read_text()[:-5])
    with MetricsLog(tmp_path, resumed_step=4, every=2) as log:
        assert log.notes == [
            f"{path}: 1 line(s) are no records and are dropped, the first is line 2",
            f"{path}: there is no record of the steps from 3 to 4",
        ]
