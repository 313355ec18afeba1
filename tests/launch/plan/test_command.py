"""`engram plan` as its users meet it: what it prints, how wide, how it refuses."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.command_line import assert_refused, invoke

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = str(CONFIGS / "tiny.yaml")
SMALL = (TINY, "--gpus-per-node", "2")


def run(*arguments: str) -> Result:
    return invoke("plan", *arguments)


def answer(*arguments: str) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_what_is_told_fits_80_columns_and_names_its_source() -> None:
    shown = run(*SMALL, "--tokens", "1B", "--price-per-gpu-hour", "2")
    assert shown.exit_code == 0, shown.output
    assert max(map(len, shown.stdout.splitlines())) <= 80
    text = " ".join(shown.stdout.split())
    for part in (
        "A GPU's memory, of 1 x 2 h100",
        "fits; ",
        "from drawn tokens, Zipf(1.2) over 4,096 ids",
        "hit rate",
        "stall by depth: 0: ",
        "1.00B tokens take",
        "recommended: offload.mode=resident",
    ):
        assert part in text
    assert "Rows of a step" not in run(*SMALL, "model.engram=null").stdout


def test_a_look_ahead_that_the_run_will_choose_is_the_model_s_choice() -> None:
    step = answer(TINY, "offload.depth=auto", "--gpus-per-node", "2")["step"]
    assert step["seconds"] == pytest.approx(step["without_stall"] + min(step["stall"].values()), rel=0.006)


def test_json_of_a_run_s_folder_adds_up(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(Path(TINY).read_text())
    found = answer(
        str(tmp_path), "--gpus-per-node", "2", "--price-per-gpu-hour", "3", "--tokens", "2M", "--gpu", "a100"
    )
    for place in ("device_bytes", "host_bytes_a_node"):
        budget = found[place]
        assert sum(budget["parts"].values()) == pytest.approx(budget["total"])
        assert budget["total"] == pytest.approx(budget["usable"] - budget["free"])
    step, budget = found["step"], found["budget"]
    assert sum(step["parts"].values()) == pytest.approx(step["without_stall"])
    assert step["seconds"] == pytest.approx(step["without_stall"] + step["stall"]["2"])
    assert found["tokens_per_s"] == pytest.approx(16 * 256 / step["seconds"])
    assert budget["days"] == pytest.approx(2e6 / found["tokens_per_s"] / 86400)
    assert budget["cost"] == pytest.approx(budget["days"] * 24 * 2 * 3)
    assert found["cluster"]["hardware"]["device"]["flops_per_second"] == 0.68e14


def test_numbers_of_the_user_s_are_laid_over_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("gpus:\n  h100:\n    device:\n      flops_per_second: 4.0e+14\n")
    hardware = answer(*SMALL, "--hardware", str(mine))["cluster"]["hardware"]["device"]
    assert (hardware["flops_per_second"], hardware["exchange_bytes_per_second"]) == (4e14, 3e11)
    mine.write_text("gpus:\n  h100:\n    device:\n      flop_per_second: 4.0e+14\n")
    refused = run(*SMALL, "--hardware", str(mine))
    assert_refused(refused, "mine.yaml: gpus.h100.device.flop_per_second: extra inputs are not permitted")


def test_what_does_not_fit_is_told_with_the_change_that_mends_it() -> None:
    wide = (*SMALL, "model.engram=null", "data.sequence_length=1048576", "train.micro_batch_size=8", "train.dtype=bf16")
    budget = answer(*wide)["device_bytes"]
    assert budget["free"] < 0
    assert budget["smallest_change"] == {"setting": "train.micro_batch_size=2", "free": pytest.approx(2.8e10, rel=0.2)}
    assert answer(*wide, "train.micro_batch_size=2")["device_bytes"]["free"] == budget["smallest_change"]["free"]
    text = " ".join(run(*wide).stdout.split())
    assert "too much; train.micro_batch_size=2 makes it fit" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TINY, "model.moe.num_expert=3"), "command line: model.moe.num_expert: unknown key; did you mean"),
        ((TINY, "model.engram.layers=[9]"), "engram.layers names layer 9, but the layers are 0 to 2"),
        (("no-such.yaml",), "no-such.yaml: no such file"),
        ((TINY, "--nodes", "0"), "Invalid value for '--nodes'"),
        ((TINY, "--gpu", "h10"), "--gpu: no numbers of 'h10', only of h200, h100, a100, b200; did you mean h100?"),
        ((*SMALL, "--nodes", "2", "--network", "ib40"), "did you mean ib400?"),
        ((*SMALL, "--nodes", "2"), "--nodes 2: say what joins the nodes with --network"),
        ((TINY, "--nodes", "3", "--network", "ib400"), "16 sequences cannot be split over 24 ranks"),
        ((TINY, "--tokens", "many"), "'many' is no number of tokens"),
        ((TINY, "--hardware", "none.yaml"), "none.yaml: no such file"),
        (
            (*SMALL, "model.hidden_size=1000000", "model.num_layers=1024", "model.dense_hidden_size=10000000"),
            "parameters of the backbone, roughly",
        ),
        ((*SMALL, "model.num_layers=1000000000"), "model.num_layers: expected an integer >= 1 and <= 1024"),
        ((*SMALL, "model.engram.rows_per_head=9000000000000"), "model.engram: parameters of the tables"),
        ((*SMALL, "train.global_batch_size=10000000"), "train.global_batch_size times data.sequence_length"),
    ],
)
def test_mistakes_are_told_in_one_line_at_once(arguments: tuple[str, ...], message: str) -> None:
    started = time.process_time()
    result = run(*arguments)
    assert time.process_time() - started < 1
    assert_refused(result, message)


def test_a_job_in_phases_is_planned_by_its_longest_sequences_and_timed_phase_by_phase() -> None:
    job = (*SMALL, "train.global_batch_size=2", "train.micro_batch_size=1", "data.sequence_length=64")
    phases = "data.phases=[{after_steps: 150, sequence_length: 128}]"
    found, longest = answer(*job, phases), answer(*job, "data.sequence_length=128", "train.steps=54")
    assert found["device_bytes"] == longest["device_bytes"]
    assert [part["budget"]["tokens"] for part in found["phases"]] == [150 * 2 * 64, 54 * 2 * 128]
    shown = " ".join(run(*job, phases).stdout.replace("│", " ").split())
    assert "phase 2 54 128" in shown
    assert "all 204" in shown
    assert "leave it out" in run(*job, phases, "--tokens", "1M").output
