import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.bench.optimizers import OPTIMIZERS
from launch.bench.options import BenchOptions
from launch.bench.path.baselines import BareGather, TorchEmbedding
from launch.bench.path.fbgemm import FbgemmEmbedding, NotInstalled
from launch.bench.table_path import TablePath
from launch.bench.worker import worker_command
from launch.bench.workload import DrawnSteps, Workload
from launch.local.environment import rank_environment
from tests.launch.missing import hide_fbgemm

SMALL = Workload(lookups=96, rows=50, dim=8, zipf=1.5, seed=3)
OPTIONS = BenchOptions(workload=SMALL, steps=4, warmup=1)


def test_ids_depend_on_seed_rank_and_step_alone() -> None:
    first = SMALL.ids(2)
    assert torch.equal(first, Workload(96, 50, 8, 1.5, 3).ids(2))
    others = [SMALL.ids(3), Workload(96, 50, 8, 1.5, 4).ids(2), Workload(96, 50, 8, 1.5, 3, rank=1).ids(2)]
    assert not any(torch.equal(first, other) for other in others)


def test_frequent_rows_are_zipf_distributed_and_scattered() -> None:
    workload = Workload(lookups=20_000, rows=100_000, zipf=2.0)
    rows, counts = workload.ids(0).unique(return_counts=True)
    counts, order = counts.sort(descending=True)
    assert counts[0] / workload.lookups == pytest.approx(0.608, abs=0.03)  # 1 / zeta(2)
    assert counts[1] / counts[0] == pytest.approx(1 / 4, abs=0.05)
    assert (rows[order[:4]].diff().abs() > 1000).all(), "frequent rows lie side by side"


def test_larger_tables_are_asked_for_the_same_rows() -> None:
    spread, tail = (Workload(96, 50, 8, 1.5, 3, **how) for how in ({"spread": 64}, {"tail": 63 * 50}))
    assert spread.table_rows == tail.table_rows == 64 * SMALL.table_rows
    assert torch.equal(spread.ids(1), 64 * SMALL.ids(1))
    assert torch.equal(tail.ids(1), SMALL.ids(1))


@pytest.mark.parametrize("lookups", [96, 7, 24])
def test_the_tokens_of_a_step_look_up_its_ids(lookups: int) -> None:
    drawn = DrawnSteps(Workload(lookups=lookups, rows=50), 3)
    for step in range(3):
        ((tokens, positions),) = drawn.batches(step)
        assert torch.equal(drawn.all_rows(tokens, positions).flatten(), drawn.ids_PN[step])
    assert drawn.most_unique == max(len(set(ids.tolist())) for ids in drawn.ids_PN)


def rows_of(path: TablePath) -> torch.Tensor:
    weights = torch.full((SMALL.rows, SMALL.dim), torch.nan)
    for ids, records in path.tables.updated_rows():
        weights[ids] = path.tables._shard.layout.weights(records)
    return weights


@pytest.mark.parametrize("optimizer", ["adam", "adam-lazy"])
def test_our_contender_trains_as_the_others_do(optimizer: str) -> None:
    # A race of contenders that do different work would be worth nothing.
    drawn = OPTIONS.draw()
    gradient_ND = SMALL.gradient() * 1000  # SparseAdam adds eps before its bias correction, Adam after
    options = BenchOptions(workload=SMALL, steps=4, warmup=1, optimizer=optimizer)
    path = TablePath("engram", drawn, options.offload(drawn), gradient_ND)
    theirs = TorchEmbedding(drawn, gradient_ND, sparse=optimizer == "adam-lazy", device=torch.device("cpu"))
    settings = options.table_optimizer
    for group in theirs._optimizer.param_groups:
        group |= {"lr": 1e-3 * settings.lr_factor, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    try:
        leaf = path.tables.look_up(drawn.batches(0)).values[0]
        for row, values in zip(drawn.ids_PN[0].unique(), leaf, strict=True):
            theirs._embedding.weight.data[row] = values
        for step in range(3):
            path.step(step)
            theirs.step(step)
        ours = rows_of(path)
    finally:
        path.close()
    shared = [row for row in drawn.ids_PN[0].unique().tolist() if not ours[row].isnan().any()]
    assert len(shared) > 10
    if optimizer == "adam":  # rows of the first step that later steps skipped are caught up when they are next read
        again = set(drawn.ids_PN[2].tolist())
        shared = [row for row in shared if row in again]
    torch.testing.assert_close(ours[shared], theirs._embedding.weight.data[shared], rtol=1e-3, atol=1e-5)


def test_fbgemm_trains_as_our_rowwise_adagrad() -> None:
    pytest.importorskip("fbgemm_gpu")
    drawn = OPTIONS.draw()
    gradient_ND = SMALL.gradient() * 100
    options = BenchOptions(workload=SMALL, steps=4, warmup=1, optimizer="rowwise-adagrad")
    path = TablePath("engram", drawn, options.offload(drawn), gradient_ND)
    theirs = FbgemmEmbedding(drawn, gradient_ND)
    rows = drawn.ids_PN[0].unique()
    table = theirs._table.split_embedding_weights()[0]
    before = table[rows].clone()
    try:
        mine_before = path.tables.look_up(drawn.batches(0)).values[0].detach().clone()
        path.step(0)
        theirs.step(0)
        moved = rows_of(path)[rows] - mine_before
    finally:
        path.close()
    theirs_moved = table[rows] - before
    torch.testing.assert_close(moved / options.table_optimizer.lr_factor, theirs_moved, rtol=1e-3, atol=1e-6)
    assert theirs_moved.abs().max() > 1e-4


def test_without_fbgemm_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_fbgemm(monkeypatch)
    with pytest.raises(NotInstalled, match=r"pip install engram-pretrain\[bench\]"):
        FbgemmEmbedding(OPTIONS.draw(), SMALL.gradient())


def test_the_bare_gather_only_reads() -> None:
    contender = BareGather(OPTIONS.draw(), torch.device("cpu"))
    before = contender._table.clone()
    contender.step(0)
    assert torch.equal(contender._table, before)


def test_every_optimizer_makes_a_valid_config() -> None:
    drawn = OPTIONS.draw()
    for name in OPTIMIZERS:
        config = BenchOptions(workload=SMALL, optimizer=name).offload(drawn, depth=0, window_depth=4)
        assert config.depth == 0
        assert config.window_rows == 7 * drawn.most_unique


def test_measuring_processes_get_a_ranks_allocator_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in rank_environment(0, 1, 1, gpus=0).items():
        monkeypatch.setenv(name, value)
    shown = {}
    for plain in (False, True):
        command = worker_command("path", replace(OPTIONS, plain_allocator=plain), Path("r.json"))
        python = command.index(sys.executable)
        code = "import os; print('MALLOC_MMAP_MAX_' in os.environ)"
        shown[plain] = subprocess.run([*command[: python + 1], "-c", code], capture_output=True, text=True).stdout
    assert shown == {False: "True\n", True: "False\n"}


def test_options_survive_the_way_to_a_measuring_process() -> None:
    assert BenchOptions.from_json(OPTIONS.to_json()) == OPTIONS
