"""Through the command line: any look-ahead and any window give the bits of tables that live on the device."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import backbone, losses, table_rows, train, write_job

VARIANTS = {
    "resident": ["offload.mode=resident"],
    "depth-0-tiny": ["offload.depth=0", "offload.window_rows={tiny}"],
    "depth-0-ample": ["offload.depth=0", "offload.window_rows=100000"],
    "depth-1-tiny": ["offload.depth=1", "offload.window_rows={tiny}"],
    "depth-1-tiny-file": ["offload.depth=1", "offload.window_rows={tiny}", "offload.host_file={folder}"],
    "depth-1-ample": ["offload.depth=1", "offload.window_rows=100000"],
    "depth-4-tiny": ["offload.depth=4", "offload.window_rows={tiny}"],
    "depth-4-ample": ["offload.depth=4", "offload.window_rows=100000"],
}
FEW = ("resident", "depth-1-tiny-file", "depth-4-tiny")
# What one step of the job needs of one rank, and little more.
TINY = {1: 1500, 2: 800}


@pytest.mark.parametrize(
    ("ranks", "names"),
    [(2, FEW), *(pytest.param(ranks, tuple(VARIANTS), marks=pytest.mark.long) for ranks in (1, 2))],
    ids=["two ranks", "one rank, all", "two ranks, all"],
)
def test_losses_and_tables_have_the_same_bits(ranks: int, names: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    job = write_job(tmp_path, corpus, train={"micro_batch_size": 2})
    outcomes = {}
    for name in names:
        texts = [override.format(tiny=TINY[ranks], folder=tmp_path) for override in VARIANTS[name]]
        train(job, f"run.name={name}", *texts, "--nproc", str(ranks))
        run = tmp_path / "runs" / name
        outcomes[name] = losses(run), table_rows(run), backbone(run)
    reference = outcomes["resident"]
    assert len(reference[0]) == 5
    assert reference[0][-1][1] is not None
    assert reference[1], "no row was updated: the test would prove nothing"
    for name, outcome in outcomes.items():
        for part, (found, expected) in enumerate(zip(outcome, reference, strict=True)):
            assert found == expected, f"{name} differs in its {('losses', 'table rows', 'backbone')[part]}"
    moved = [int(line.split('"offload.writeback_rows": ')[1].split(",")[0].rstrip("}"))
             for line in (tmp_path / "runs" / "depth-4-tiny" / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
    assert sum(moved) > 0, "the tiny window never wrote a row back: the test would prove nothing"


@pytest.mark.long
def test_a_look_ahead_that_is_chosen_has_the_same_bits_and_is_told_in_a_resumed_run_as_well(
    corpus: Path, tmp_path: Path
) -> None:
    quick = {"train": {"steps": 92, "log_every": 4}, "eval": {"every": 92}, "checkpoint": {"every": 46}}
    job = write_job(tmp_path, corpus, **quick, offload={"window_rows": 900, "depth": 0})
    fixed, auto = tmp_path / "runs" / "fixed", tmp_path / "runs" / "auto"
    train(job, "run.name=fixed", "--nproc", "2")
    chosen = []
    for _ in range(2):
        result = train(job, "run.name=auto", "offload.depth=auto", "--nproc", "2")
        state, summary = (json.loads((auto / name).read_text()) for name in ("run.json", "summary.json"))
        assert f"offload.depth: {state['look_ahead']} (of a step of " in result.stdout
        assert f"look-ahead {state['look_ahead']}, as offload.depth=auto chose" in result.stdout
        assert state["look_ahead"] == summary["look_ahead"]
        assert (losses(auto), table_rows(auto), backbone(auto)) == (losses(fixed), table_rows(fixed), backbone(fixed))
        chosen.append(state["look_ahead"])
        shutil.rmtree(auto / "checkpoints" / "step-00000092")  # it goes on from step 46
    assert set(chosen) <= {1, 2, 4}
