"""`engram bench offload` end to end, at sizes of milliseconds."""

import json
from pathlib import Path

import pytest

from launch.bench.optimizers import OPTIMIZERS
from launch.bench.options import BenchOptions
from launch.bench.parts import PARTS
from launch.bench.report import Section
from launch.commands import bench_parts as parts
from tests.command_line import engram, fresh_engram, invoke

TINY = ("--lookups", "64", "--rows", "100", "--dim", "4", "--steps", "2", "--warmup", "1", "--compute-ms", "2")


def test_json_is_the_only_thing_on_stdout_and_tells_how_it_was_measured() -> None:
    result = engram("bench", "offload", *TINY, "--optimizer", "rowwise-adagrad", "--seed", "5", "--json")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer.keys() == {"machine", "options", "parts"}
    assert answer["machine"].keys() == {"processor", "cores", "threads", "memory_gib", "python", "torch"}
    assert answer["options"]["optimizer"] == "rowwise-adagrad"
    assert answer["options"]["workload"]["seed"] == 5
    (part,) = answer["parts"].values()
    assert part.keys() == {"title", "rows", "measures", "notes"}
    ours = [row["contender"] for row in part["rows"] if row["contender"].startswith("engram")]
    assert ours == [
        f"engram, {each}, {mode}" for each in ("rowwise-adagrad", "adam") for mode in ("resident", "window")
    ]
    for row in part["rows"]:
        assert row.keys() == {"contender", "step_ms", "background_ms", "cpu_ms", "cpu_of_fbgemm", "of_fbgemm",
                              "least_mb", "least_ms", "status"}  # fmt: skip
        if row["status"] == "measured":
            assert row["step_ms"]["p10"] <= row["step_ms"]["median"] <= row["step_ms"]["p90"]


def test_checkpoints_are_measured_beside_the_disk_and_nothing_stays(tmp_path: Path) -> None:
    sizes = ("--table-mib", "4", "--rounds", "2", "--lookups", "64", "--compute-ms", "1")
    result = engram("bench", "checkpoint", *sizes, "--folder", str(tmp_path), "--json")
    assert result.returncode == 0, result.stderr
    part = json.loads(result.stdout)["parts"]["checkpoint"]
    rows = {row["what"]: row for row in part["rows"]}
    assert [*rows] == ["dd", "save", "checksums", "cat", "load", "steps without", "steps with"]
    assert all(rows[name]["ratio"]["median"] > 0 for name in ("save", "checksums", "load", "steps with"))
    assert [name for name, row in rows.items() if row["peak_mib"]] == ["save", "load", "steps with"]
    assert len(part["measures"]) == 8
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
def test_data_are_measured_beside_tokenizers_and_a_run(trained: Path, tmp_path: Path) -> None:
    result = fresh_engram(
        "bench", "data", "--text-mb", "1", "--rounds", "2", "--folder", tmp_path, "--run", trained, "--json"
    )
    assert result.returncode == 0, result.stderr
    part = json.loads(result.stdout)["parts"]["data"]
    names = [row["what"] for row in part["rows"]]
    assert names == ["tokenizers", "prepare", *["prepare, one file"] * 2, *["prepare, one document"] * 2, "loader"]
    assert all(row["tokens_per_second"] > 0 for row in part["rows"] if row["ms"])
    assert part["rows"][1]["ratio"]["median"] == part["measures"][0]["value"]
    assert part["rows"][-1]["of"].startswith("8 x 32, beside a step of ")
    assert len(part["measures"]) == 4
    assert all(row["peak_mib"] > 1 for row in part["rows"][2:6])
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
def test_stalls_are_measured_on_one_and_two_ranks_and_named_as_emulation() -> None:
    result = engram("bench", "offload", "--part", "stall", *TINY, "--lookups", "256", "--rows", "20000", "--json")
    assert result.returncode == 0, result.stderr
    stall = json.loads(result.stdout)["parts"]["stall"]
    assert [(row["ranks"], row["depth"]) for row in stall["rows"]] == [
        (ranks, depth) for ranks in (1, 2) for depth in (0, 0, 1, 2, 4)
    ]
    assert "EMULATED" in stall["title"]
    assert "emulated" in stall["notes"][0]
    # Whatever the machine, a link that is slow on purpose makes depth 0 wait.
    slow = [row for row in stall["rows"] if row["depth"] == 0 and row["emulated_link"] != "none"]
    assert all(row["stall_percent_of_the_step"] > 10 for row in slow)


def test_a_table_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[tuple[str, ...], BenchOptions]] = []

    def run_parts(names: tuple[str, ...], options: BenchOptions) -> dict[str, Section]:
        asked.append((names, options))
        return {name: Section(f"All about {name}", [{"contender": "engram", "step_ms": 1.5}]) for name in names}

    monkeypatch.setattr("launch.bench.run.run_parts", run_parts)
    result = invoke("bench", "offload", "--part", "all", "--threads", "3", "--depth", "0")
    assert result.exit_code == 0
    ((names, options),) = asked
    assert (options.threads, options.depth) == (3, 0)
    assert names == parts.PARTS
    assert all(f"All about {name}" in result.stdout for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zipf", "1"], "Invalid value for '--zipf'"),
        (["--part", "speed"], "Invalid value for '--part'"),
        (["--host-file", ".", *TINY], "offload: host_file has no meaning with mode=resident"),
        (["--window-rows", "1", *TINY], "offload.window_rows: step 1 alone needs"),
        (["--part", "stall", *TINY, "--rows", "40"], "% of a step's rows need no fetch"),
        (["checkpoint", "--table-mib", "1000000000"], "are free: choose another --folder or a smaller --table-mib"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments: list[str], message: str) -> None:
    result = engram("bench", *([] if arguments[0] == "checkpoint" else ["offload"]), *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    told = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert message in told[0]
    assert "Traceback" not in result.stderr


def test_a_job_among_the_overrides_is_told_where_it_belongs() -> None:
    told = invoke("bench", "train", "nope.yaml", "train.steps=3")
    assert told.exit_code == 2
    assert told.output.startswith(
        "Error: 'nope.yaml' is no override SECTION.KEY=VALUE. If it is the job: --job nope.yaml"
    )


def test_the_command_offers_what_there_is() -> None:
    # The command names them itself, so that its help need not import torch.
    assert {*parts.PARTS, "kernels", "links", "checkpoint", "data", "train"} == {*PARTS}
    assert {"adam", "adam-lazy", "rowwise-adagrad", "rowwise-rmsprop"} <= set(OPTIMIZERS)
