"""`engram tune` on a real job: what it measures, keeps, goes on from, and writes."""

import json
from pathlib import Path

import pytest

from tests.command_line import engram, write_job

LINK = {"bytes_per_second": 1e9, "latency_s": 0.02}


@pytest.mark.parametrize(("ranks", "in_file"), [(1, True), pytest.param(2, False, marks=pytest.mark.long)])
def test_a_tuning_that_was_cut_short_goes_on_and_writes_what_it_recommends(
    ranks: int, in_file: bool, corpus: Path, tmp_path: Path
) -> None:
    """Tables in memory, or in a file on a disk."""
    offload = {"depth": 0, "window_rows": 2500, "emulate_link": LINK, "host_file": str(tmp_path) if in_file else None}
    job = write_job(tmp_path, corpus, run={"nproc": ranks}, offload=offload)
    job.write_text("# My job.\n" + job.read_text())
    before = job.read_text()

    short = engram("tune", job, "--minutes", "0.1", "--json")
    assert short.returncode == 0, short.stderr
    first = json.loads(short.stdout)
    assert not first["finished"]
    assert first["turns"]
    assert job.read_text() == before, "nobody asked to write"
    assert not (tmp_path / "runs" / "small").exists(), "the run's own folder is touched"

    whole = engram("tune", job, "--minutes", "0.15", "--write")
    assert whole.returncode == 0, whole.stderr
    assert f"going on from {len(first['turns'])} turns" in whole.stderr
    assert "configured" in whole.stdout
    assert "because" in whole.stdout
    kept = json.loads((tmp_path / "runs" / "small.tune" / "tune.json").read_text())
    assert kept["turns"][: len(first["turns"])] == first["turns"]
    assert len(kept["turns"]) > len(first["turns"])
    assert all(turn["fetched"] > 0 for turn in kept["turns"] if turn["point"]["window_rows"] < 4000)
    if kept["best"]["depth"] != offload["depth"]:
        assert f"offload.depth={kept['best']['depth']}" in whole.stdout
    assert job.read_text().startswith("# My job.\n")
    assert f"  depth: {kept['best']['depth']}\n" in job.read_text()
    waits = {turn["point"]["depth"]: turn["stall_ms"] for turn in kept["turns"]}
    # The link takes 20 ms each way: only a look-ahead hides them.
    assert waits[0] > 10, "the emulated link is not waited for"
    assert min(wait for depth, wait in waits.items() if depth) < waits[0]


def test_what_cannot_be_tuned_is_told_in_one_line(corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus)
    resident = engram("tune", job, "offload.mode=resident")
    assert (resident.returncode, resident.stderr.splitlines()[-1]) == (
        2,
        "Error: offload.mode=resident fetches no rows, and there is nothing to tune: set offload.mode=window",
    )
    tiny = engram("tune", job, "offload.window_rows=10", "--nproc", "1", "--minutes", "0.1")
    assert tiny.returncode == 2
    assert "offload.window_rows: step 1 alone needs" in tiny.stderr.splitlines()[-1]
