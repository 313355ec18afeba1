"""`engram bench kernels` and `engram bench links` end to end, on a CPU, at sizes of milliseconds."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

import tests.kernels.conftest  # noqa: F401 - loops in Triton's interpreter
from kernels.rows.adam_closed import GapSums
from launch.bench.clock import CpuClock
from launch.bench.deadline import Deadline
from launch.bench.kernels import part as kernels
from launch.bench.kernels.cases import Case, Sizes, gather_cases, hash_cases
from launch.bench.kernels.optimizer_cases import optimizer_cases
from launch.bench.kernels.part import _FAMILIES, _family_rows, measure_kernels
from launch.bench.links import part as links
from launch.bench.links.part import _ways, measure_links
from launch.bench.options import BenchOptions
from launch.bench.report import Measure
from offload.optimizers.adam import Adam
from tests.command_line import TIMEOUT_S, engram
from tests.warm_command import started_warm
from train.progress import Progress

CPU = Sizes(torch.device("cpu"), tokens=8, hidden=16, host_bytes=1 << 22)


def time_briefly() -> None:
    """Nothing is timed for longer than it takes to run it a few times."""
    for part in (kernels, links):
        part._SECONDS["cpu"] = 0.0


def bench(*arguments: str) -> dict[str, Any]:
    """What `engram bench` answers in JSON."""
    command, environment = ["bench", *arguments, "--device", "cpu", "--json"], {"OMP_NUM_THREADS": "1"}
    with started_warm(command, cwd=None, environment=environment, prepare=time_briefly) as started:
        result = started.result(TIMEOUT_S)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_kernel_is_timed_beside_the_limit_that_was_measured() -> None:
    answer = bench("kernels", "--tokens", "4", "--seconds", "600")
    assert answer["options"]["device"] == "cpu"
    (part,) = answer["parts"].values()
    assert [row["status"] for row in part["rows"]] == ["measured"] * len(part["rows"])
    kernels = {row["kernel"] for row in part["rows"]}
    assert {
        "hash",
        "gather forward",
        "gather backward",
        "read and update, Adam, exact",
        "records fetch",
        "records write",
    } < kernels
    assert {"gate forward", "gate backward", "initial rows"} < kernels
    for row in part["rows"]:
        assert row["ours_us"]["p10"] <= row["ours_us"]["median"] <= row["ours_us"]["p90"]
        assert row["GB_per_s"] == pytest.approx(1e3 * row["moved_MB"] / row["ours_us"]["median"])
        assert row["of_the_limit"] > 0
    assert "on a CPU" in part["notes"][-1]


def test_without_time_everything_is_named_as_left_out() -> None:
    with Progress("kernels", active=False) as progress:
        rows = measure_kernels(BenchOptions(tokens=4, seconds=0.0), progress).rows
    assert [(row["kernel"], row["status"]) for row in rows] == [
        (family, "left out: no time was left") for family in _FAMILIES
    ]


def test_a_kernel_that_fails_leaves_the_others_their_figures() -> None:
    def cases(sizes: Sizes) -> Iterator[Case]:
        yield Case("fine", "", 10, lambda: None)
        yield Case("broken", "", 10, lambda: 1 / 0)

    rows = list(_family_rows("family", cases, CPU, CpuClock(0.0), {"memory": 1e9}, Deadline(None)))
    assert [row["status"] for row in rows] == ["measured", "failed: ZeroDivisionError: division by zero"]
    assert rows[0].keys() == rows[1].keys()


def test_moved_bytes_are_those_of_the_tensors() -> None:
    (case,) = hash_cases(CPU)
    rows = case.ours()
    assert isinstance(rows, torch.Tensor)
    assert rows.shape == (2, 1, 8, 16)
    assert case.nbytes == rows.nbytes + 2 * 8 * 8
    forward, backward, *_ = gather_cases(CPU)
    index, unique = CPU.index
    out, sums = forward.ours(), backward.ours()
    assert isinstance(out, torch.Tensor)
    assert isinstance(sums, torch.Tensor)
    assert forward.nbytes == out.nbytes + 4 * unique * 80 + index.segment_N.nbytes
    assert backward.nbytes == out.nbytes + sums.nbytes + index.order_N.nbytes + index.segment_N.nbytes + 4 * unique


@pytest.mark.parametrize("case", optimizer_cases(CPU), ids=lambda case: f"{case.kernel}, {case.sizes}")
def test_an_update_and_its_reference_do_the_same(case: Case) -> None:
    owner = case.reference.__self__  # type: ignore[union-attr]
    before_CW = owner._records_CW.clone()
    results = []
    for run in (case.ours, case.reference):
        owner._records_CW.copy_(before_CW)
        case.prepare()  # type: ignore[misc]
        run()  # type: ignore[misc]
        results.append(owner._records_CW.clone())
    assert torch.equal(results[0].view(torch.int32)[:, -1], results[1].view(torch.int32)[:, -1])
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0], before_CW)


def test_sums_over_gaps_are_made_before_a_run_is_timed() -> None:
    """By Triton's kernels too, which do nothing at all for no rows."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here: no interpreter for CPU tensors")
    with (
        mock.patch.object(Adam, "compiled", Adam.triton),
        mock.patch.object(GapSums, "_add", autospec=True, side_effect=GapSums._add) as added,
    ):
        (case,) = (each for each in optimizer_cases(CPU) if "closed" in each.kernel and "missed" in each.sizes)
        case.prepare()  # type: ignore[misc]
        before = added.call_count
        case.ours()
    assert added.call_count == before > 0


def test_links_on_a_cpu_are_named_as_copies_from_host_to_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(links._SECONDS, "cpu", 0.0)
    with Progress("links", active=False) as progress:
        section = measure_links(BenchOptions(memory_mib=4), progress)
    assert section.title == "Copies from host to host"
    assert {row["bytes_a_record"] for row in section.rows} == {None, 160, 256, 512, 1024, 1152}
    assert {row["order"] for row in section.rows} == {"", "ascending", "random"}
    assert all(row["status"] == "measured" for row in section.rows)
    assert "no GPU" in section.notes[-1]


def test_links_of_chosen_records() -> None:
    answer = bench("links", "--memory-mib", "4", "--programs", "4,16", "--record-bytes", "964,512")
    assert (answer["options"]["programs"], answer["options"]["record_bytes"]) == ([4, 16], [964, 512])
    (part,) = answer["parts"].values()
    assert {row["bytes_a_record"] for row in part["rows"]} == {None, 964, 512}


def test_programs_take_turns_where_there_is_a_gpu() -> None:
    link = SimpleNamespace(device=torch.device("cuda"), host_N=torch.empty(64), device_N=torch.empty(64))
    link.host_records = link.device_records = lambda words: torch.empty(4, words)
    link.draw_rows = lambda count, words, ordered: torch.arange(count)
    link.draw_slots, link.fetch_options = torch.arange, lambda words: {}
    ways = list(_ways(link, 256, (64,), (4, 8, 16)))  # type: ignore[arg-type]
    assert [way.programs for way in ways] == [None] * 2 + [8] * 4 + [4] * 4 + [16] * 4


@pytest.mark.parametrize("chosen", [("--record-bytes", "160,962"), ("--programs", "4,many"), ("--programs", "0")])
def test_links_of_what_cannot_be_are_refused(chosen: tuple[str, str]) -> None:
    result = engram("bench", "links", "--device", "cpu", *chosen)
    assert result.returncode == 2
    assert chosen[0] in result.stderr


def test_links_leave_out_what_does_not_fit() -> None:
    with Progress("links", active=False) as progress:
        section = measure_links(BenchOptions(memory_mib=4, seconds=0.0), progress)
    assert {row["status"] for row in section.rows} == {"left out: no time was left"}


def test_a_measure_can_be_a_least_value() -> None:
    assert Measure("share", 0.9, 0.8, at_least=True).met
    assert not Measure("share", 0.7, 0.8, at_least=True).met
    assert str(Measure("share", 0.7, 0.8, at_least=True)) == "NOT MET: share: 0.7 (at least 0.8)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_in_one_line() -> None:
    result = engram("bench", "links", "--device", "cuda")
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if line.startswith("Error: ")] == [
        "Error: torch finds no usable GPU: measure with --device cpu"
    ]


@pytest.mark.gpu
def test_on_a_gpu_everything_runs() -> None:
    for part, size in (("kernels", ("--tokens", "256")), ("links", ("--memory-mib", "64"))):
        result = engram("bench", part, "--device", "cuda", *size, "--json")
        assert result.returncode == 0, result.stderr
        (section,) = json.loads(result.stdout)["parts"].values()
        assert [row["status"] for row in section["rows"]] == ["measured"] * len(section["rows"])
