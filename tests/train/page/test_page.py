"""The report of runs: one page that needs nothing else, and is readable at any width."""

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from launch.cli import main
from tests.command_line import engram, write_job
from tests.train.page.browser import browser, look
from train.config.file import dump, load
from train.config.job import JobConfig
from train.page.chart import Chart, Line, line_chart, short
from train.page.page import page
from train.page.timeline import timeline
from train.page.told_run import ToldRun, flat
from train.report.trace import LANE, LANES
from train.run_state import RunState

STAGES = ("plan", "fetch", "exchange", "forward", "backward", "reduce", "update", "other")


def leave(folder: Path, name: str, *overrides: str, steps: int = 50) -> ToldRun:
    """Leaves what a run leaves."""
    run = folder / name
    run.mkdir()
    job = load(write_job(folder, folder), [f"run.name={name}", *overrides], JobConfig)
    dump(job, run / "config.yaml")
    RunState("failed", steps, 60, why="<b>boom</b>", machine={"cores": 4, "memory_gib": 80.5}).write(run)
    records = [
        {
            "step": step,
            "loss": 5.0 - step / 20,
            "lr": 1e-3,
            "grad_norm": 10.0 ** (step % 3),
            "tokens": 256 * step,
            "tokens_per_s": 1e5 + step,
            "offload.stall_ms": float(step % 5),
            "offload.hit_rate": 0.8,
            "offload.fetch_rows": 1200,
            "offload.writeback_rows": 700,
            "memory.host_bytes": 2**31,
            "experts.busiest": 1.5,
            "gate.0.mean": 0.4,
            "gate.0.open": 0.2,
            **{f"stages.{stage}_ms": float(number) for number, stage in enumerate(STAGES)},
            **({"val_loss": 4.0} if step % 10 == 0 else {}),
        }
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    skipped = {"step": 7, "why": "its gradient is not finite", "batch": 7, "loss": float("nan")}
    (run / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    return ToldRun(run, len(list(folder.glob("*/run.json"))) - 1)


def leave_trace(run: ToldRun) -> None:
    events = [
        {"ph": "X", "cat": LANE, "name": lane, "pid": rank, "tid": tid, "ts": 100.0 * tid, "dur": 90.0}
        for rank in range(3)
        for tid, lane in enumerate(LANES)
    ]
    (run.folder / "trace.json.gz").write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))


@pytest.fixture
def runs(tmp_path: Path) -> list[ToldRun]:
    """Two runs of other look-aheads, the first with recorded steps."""
    found = [leave(tmp_path, "one", "offload.depth=1"), leave(tmp_path, "two", "offload.depth=4", "train.seed=3")]
    leave_trace(found[0])
    base = flat(found[1].job) | {"train.seed": 1234}
    (found[1].folder / "base.yaml").write_text(yaml.safe_dump({"name": "configs/base.yaml", "values": nested(base)}))
    return found


def nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inside = found
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
    return found


def test_charts_are_written_as_pictures(runs: list[ToldRun], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    folder = runs[0].folder
    done = CliRunner().invoke(main, ["report", *(str(run.folder) for run in runs), "--no-memory", "--png"])
    assert done.exit_code == 0, done.output
    pictures = {path.name for path in folder.glob("report-*.png")}
    assert {"report-loss.png", "report-throughput.png", "report-gates-of-layer-0.png"} <= pictures
    assert {Path(line).name for line in done.stdout.splitlines()[1:]} == pictures
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = CliRunner().invoke(main, ["report", str(folder), "--no-memory", "--png"])
    assert told.exit_code != 0
    assert "plots need matplotlib; run: pip install 'engram-pretrain[plots]'" in told.output


def test_the_page_has_all_figures_and_needs_nothing_else(runs: list[ToldRun]) -> None:
    text = page(runs)
    titles = re.findall(r"<figcaption>([^<]*)", text)
    assert [title.strip() for title in titles] == [
        *("Loss", "Learning rate", "Gradient norm", "Load of the busiest expert", "Throughput", "Host memory"),
        *("A step&#x27;s time: one", "A step&#x27;s time: two"),
        *("Hit rate", "Rows moved", "Stall", "Gates of layer 0", "Stall against look-ahead", "Recorded steps"),
    ]
    assert not re.search(r"<script|https?:|src=|@import|url\(", text)
    assert "&lt;b&gt;boom&lt;/b&gt;" in text
    assert "<b>boom" not in text
    assert "step 7 skipped: its gradient is not finite" in text
    assert "Compared after step 50" in text
    differing = text.partition("What differs between them")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>([^<]*)", differing) == ["train.seed", "offload.depth"]
    changed = text.partition("of one: what differs from the defaults")[2].partition("</table>")[0]
    assert "<td>model.vocab_size</td><td>300</td>" in changed
    assert "train.hang_s" not in changed
    changed = text.partition("of two: what differs from configs/base.yaml")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)", changed) == [("train.seed", "3", "1234")]
    machine = text.partition("Machine of rank 0")[2].partition("</table>")[0]
    assert "<td>memory gib</td><td>80.5</td><td>80.5</td>" in machine


def test_a_run_of_which_little_is_known_has_a_page(tmp_path: Path) -> None:
    run = leave(tmp_path, "young", steps=0)
    (run.folder / "run.json").unlink()
    text = page([run])
    assert "not started" in text
    assert "No step was recorded yet." in text
    assert "<figure>" not in text


def test_lanes_are_drawn_for_the_first_ranks(runs: list[ToldRun]) -> None:
    drawn = timeline(runs[0].folder)
    assert len(re.findall("<rect", drawn)) == 2 * len(LANES)
    assert "3 ranks recorded" in drawn
    assert timeline(runs[1].folder) == ""
    trace = bytearray((runs[0].folder / "trace.json.gz").read_bytes())
    trace[20] ^= 0xFF
    for damaged in (b"no trace", bytes(trace)):
        (runs[1].folder / "trace.json.gz").write_bytes(damaged)
        assert timeline(runs[1].folder) == ""


def test_a_long_run_keeps_its_spikes_in_a_small_chart() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    points[7] = (7.0, float("nan"))
    drawn = line_chart(Chart("a", [Line("a", points)]))
    assert len(drawn) < 40_000
    ys = [float(place.split(",")[1]) for place in re.findall(r'points="([^"]*)"', drawn)[0].split()]
    assert min(ys) == 16.0, "the spike is at the top"
    assert line_chart(Chart("a", [Line("a", [(1.0, float("nan"))])])) == ""


def test_axes_are_readable() -> None:
    assert [short(value) for value in (0.02, 1500, 3e-5, 2.5e9)] == ["0.02", "1.5k", "3e-05", "2.5G"]
    flat = line_chart(Chart("flat", [Line("a", [(1.0, 2.0), (2.0, 2.0)])]))
    assert "nan" not in flat
    log = line_chart(Chart("log", [Line("a", [(1.0, 0.1), (2.0, 1000.0)])], logarithmic=True))
    ticks = re.findall(r'text-anchor="end" x="70" y="[\d.]+">([^<]*)', log)
    assert ticks == ["0.1", "1", "10", "100", "1k"]


def test_the_command_shows_gates_of_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    result = engram("report", trained, "--out", tmp_path / "page.html", "--text", "def f(self):\n    return")
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "page.html").read_text()
    assert text.count('class="text"') == 2
    assert re.search(r"\d of [\d,]+ rows were ever updated", text)
    assert re.search(r'style="--gate:\d+%" title="gate 0\.\d\d; ', text)


def test_wrong_use_is_told(runs: list[ToldRun]) -> None:
    wrong = CliRunner().invoke(main, ["report", str(runs[0].folder), "--text", "a", "--no-memory"])
    assert wrong.exit_code == 2
    plain = CliRunner().invoke(main, ["report", str(runs[0].folder), "--no-memory"])
    assert (plain.exit_code, plain.stdout) == (0, f"{runs[0].folder / 'report.html'}\n")
    told = CliRunner().invoke(main, ["report", str(runs[0].folder)])
    assert told.exit_code == 0
    assert "no checkpoint yet" in (runs[0].folder / "report.html").read_text()


@pytest.mark.long
class TestInABrowser:
    @pytest.fixture(autouse=True)
    def needs_a_browser(self) -> None:
        if browser() is None:
            pytest.skip("needs Chromium (Debian: chromium-headless-shell)")

    @pytest.mark.parametrize("width", [1280, 390])
    def test_every_chart_is_drawn_and_no_text_overflows(self, width: int, runs: list[ToldRun], tmp_path: Path) -> None:
        leave(tmp_path, "a-run-with-a-name-that-is-as-long-as-names-get-when-a-script-makes-them-0123456789")
        told = [*runs, ToldRun(tmp_path / next(tmp_path.glob("a-run*")).name, 2)]
        (tmp_path / "page.html").write_text(page(told))
        found = look(tmp_path / "page.html", width)
        assert found.pop("figures") == 15
        assert found == {"width": width, "empty": [], "out": [], "wide": [], "scrolls": False, "console": []}

    def test_what_is_wrong_is_seen(self, runs: list[ToldRun], tmp_path: Path) -> None:
        text = page(runs[:1]).replace("</body>", '<p style="width: 2000px">wide</p><script>nonsense()</script></body>')
        text = re.sub(r"<polyline.*?</polyline>", "", text, count=2)
        text = text.replace('<text class="tick" text-anchor="end"', '<text class="tick" text-anchor="start"')
        (tmp_path / "page.html").write_text(text)
        found = look(tmp_path / "page.html", 1280)
        assert found["scrolls"]
        assert "wide" in found["wide"]
        assert found["out"]
        assert any("nonsense is not defined" in line for line in found["console"])
