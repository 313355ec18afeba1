"""Row optimizers on records: in their slots and in order, over many steps with gaps, in fp32 and bf16."""

import copy
import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels import compiled_loops
from kernels.rows.stochastic_rounding import stochastic_round_bf16_
from offload.config import RowDtype, TableOptimizerConfig
from offload.optimizers import OPTIMIZERS as KINDS
from offload.rows import placed as placed_records
from offload.rows.records import RecordLayout, RowInit
from offload.rows.updater import RowUpdater
from tests.grid import grid

DIM, ROWS, STEPS, SEED = 5, 40, 60, 9
OPTIMIZERS = {
    f"{kind}-{untouched}": TableOptimizerConfig(type=kind, untouched_rows=untouched, beta2=0.9)
    for kind in KINDS
    for untouched in ("exact", "closed", "lazy")
    if untouched != "closed" or kind == "adam"
} | {
    f"{kind}-{untouched}-bf16-state": TableOptimizerConfig(
        type=kind, untouched_rows=untouched, beta2=0.9, state_dtype="bf16"
    )
    for kind, optimizer in KINDS.items()
    if "bf16" in optimizer.state_dtypes
    for untouched in ("exact", "closed", "lazy")
}
ALL = pytest.mark.parametrize("name", OPTIMIZERS)
DTYPES = pytest.mark.parametrize("row_dtype", ["fp32", "bf16"])


def used_rows(step: int) -> Tensor:
    """Half of the rows at nearly every step, a quarter seldom, the last never."""
    generator = torch.Generator().manual_seed(step)
    chance = torch.cat([torch.full((20,), 0.8), torch.full((19,), 0.05), torch.zeros(1)])
    return (torch.rand(ROWS, generator=generator) < chance).nonzero().flatten()


def gradient(step: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(count, DIM, generator=generator) * 10 ** torch.randn(count, 1, generator=generator)


def rate(step: int) -> float:
    return 1e-3 * (1 + step % 7)


def fresh_table(layout: RecordLayout) -> Tensor:
    records = torch.zeros(ROWS, layout.words)
    RowInit(SEED, 0.02).fill(layout, records, ids(torch.arange(ROWS)))
    return records


def ids(rows: Tensor) -> Tensor:
    return rows * 3 + 2**33


def in_order(name: str, row_dtype: RowDtype) -> Tensor:
    """The table after all steps, each on a copy of the rows it uses."""
    return _in_order(name, row_dtype).clone()


@functools.cache
def _in_order(name: str, row_dtype: RowDtype) -> Tensor:
    config = OPTIMIZERS[name]
    layout = RecordLayout.of(DIM, config, row_dtype)
    updater, table = RowUpdater(config, layout, seed=SEED), fresh_table(layout)
    for step in range(STEPS):
        rows = used_rows(step)
        taken = layout.unpack(table[rows])
        updater.catch_up(taken)
        updater.update(taken, gradient(step, len(rows)) * 0.3, rate(step), ids(rows))
        table[rows] = layout.pack(taken)
    return table


@pytest.mark.parametrize(
    ("name", "how"),
    grid([*OPTIMIZERS], [("fp32", "compiled"), ("bf16", "plain"), ("bf16", "compiled"), ("fp32", "plain")]),
)
def test_rows_in_their_slots_get_the_bits_of_rows_in_order(
    name: str, how: tuple[RowDtype, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row_dtype, loops = how
    if loops == "plain":
        monkeypatch.setattr(compiled_loops, "available", lambda: False)
    monkeypatch.setattr(placed_records, "_BLOCK_BYTES", 500)  # several blocks a step, the last one short
    config = OPTIMIZERS[name]
    layout = RecordLayout.of(DIM, config, row_dtype)
    updater = RowUpdater(config, layout, seed=SEED)
    window = torch.full((70, layout.words), 3.0)
    slot_of = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:ROWS]
    window[slot_of] = fresh_table(layout)
    for step in range(STEPS):
        rows = used_rows(step)
        if step % 10 == 5:  # another rank's worth of rows is looked at, and left alone
            before = window.clone()
            updater.read(window, slot_of)
            assert torch.equal(window, before)
        read = updater.read(window, slot_of[rows])
        weights = read.weights.tensor()
        seen = layout.unpack(window[slot_of[rows]])
        updater.catch_up(seen)
        assert torch.equal(weights, layout.unpacked.weights(seen))
        if step % 10 == 7:  # an evaluation between a read and its update
            others = slot_of[rows.flip(0)]
            assert torch.equal(updater.look_at(window[others]).tensor().flip(0), weights)
        grad = gradient(step, len(rows))
        updater.update_at(read, grad, rate(step), ids(rows), gradient_scale=0.3)
    expected = in_order(name, row_dtype)
    assert torch.equal(window[slot_of].view(torch.int32), expected.view(torch.int32))
    free = torch.ones(70, dtype=torch.bool).index_fill_(0, slot_of, False)
    assert (window[free] == 3).all()


@ALL
def test_versions_are_the_number_of_the_last_update(name: str) -> None:
    layout = RecordLayout.of(DIM, OPTIMIZERS[name])
    last = torch.zeros(ROWS, dtype=torch.int32)
    for step in range(STEPS):
        last[used_rows(step)] = step + 1
    assert torch.equal(layout.version(in_order(name, "fp32")), last)


def dense(config: TableOptimizerConfig) -> Tensor:
    """Weights of a table that steps densely, every row at every step."""
    layout = RecordLayout.of(DIM, config)
    updater, table = RowUpdater(config, layout, seed=SEED), fresh_table(layout)
    for step in range(STEPS):
        rows = used_rows(step)
        whole = torch.zeros(ROWS, DIM).index_copy_(0, rows, gradient(step, len(rows)) * 0.3)
        updater.update(table, whole, rate(step))
    return table


@pytest.mark.parametrize("kind", KINDS)
def test_exact_rows_are_those_of_the_dense_optimizer(kind: str) -> None:
    config = OPTIMIZERS[f"{kind}-exact"]
    layout = RecordLayout.of(DIM, config)
    table = in_order(f"{kind}-exact", "fp32")
    # To compare the state, too: one more step, on every row.
    updater = RowUpdater(config, layout)
    updater.load_state(updater.state() | {"learning_rates": [5 * rate(step) for step in range(STEPS)]})
    updater.catch_up(table)
    expected, last = dense(config), torch.randn(ROWS, DIM)
    assert torch.equal(layout.weights(table), layout.weights(expected))
    for records in (table, expected):
        copy.deepcopy(updater).update(records, last, 0.1)
    assert torch.equal(table, expected)


@pytest.mark.parametrize("kind", ["adam", "rowwise_rmsprop"])
def test_lazy_rows_are_not(kind: str) -> None:
    lazy, exact = (in_order(f"{kind}-{untouched}", "fp32") for untouched in ("lazy", "exact"))
    assert not torch.equal(lazy[20:], exact[20:])


def slow_bf16_adam(config: TableOptimizerConfig) -> tuple[Tensor, Tensor]:
    """What the docstring of `offload.rows.updater` says, one row and one step at a time; weights and moments."""
    layout = RecordLayout.of(DIM, config, "bf16")
    # Whole vectors of the processor: torch's loop over what remains has another rounding.
    weights = pad(layout.weights(fresh_table(layout)).float(), (0, 16 - DIM))
    moments = torch.zeros(2, ROWS, 16)
    rounded_at = [0] * ROWS
    for step in range(1, STEPS + 1):
        rows = used_rows(step - 1)
        grads = gradient(step - 1, len(rows)) * 0.3
        for row, grad in zip(rows.tolist(), grads, strict=True):
            for missed in range(rounded_at[row] + 1, step + 1):
                one = torch.nn.Parameter(weights[row].clone())
                adam = torch.optim.Adam([one], lr=5 * rate(missed - 1), betas=(config.beta1, config.beta2), fused=True)
                adam.state[one] = {
                    "step": torch.tensor(missed - 1.0), "exp_avg": moments[0, row], "exp_avg_sq": moments[1, row]
                }  # fmt: skip
                one.grad = pad(grad if missed == step else torch.zeros(DIM), (0, 16 - DIM))
                adam.step()
                weights[row] = one.detach()
            stochastic_round_bf16_(weights[row : row + 1], ids(torch.tensor([row])), seed=SEED, step=step)
            rounded_at[row] = step
    return weights[:, :DIM], moments[..., :DIM]


def test_bf16_rows_replay_in_fp32_and_round_once_at_their_update() -> None:
    config = OPTIMIZERS["adam-exact"]
    layout = RecordLayout.of(DIM, config, "bf16")
    table = in_order("adam-exact", "bf16")
    weights, moments = slow_bf16_adam(config)
    assert torch.equal(layout.weights(table).float(), weights)
    assert torch.equal(layout.state(table), torch.cat(list(moments), dim=1))


@ALL
def test_bf16_rows_follow_fp32_rows_at_their_precision(name: str) -> None:
    config = OPTIMIZERS[name]
    parts = [RecordLayout.of(DIM, config, dtype) for dtype in ("bf16", "fp32")]
    low, high = (layout.weights(in_order(name, layout.row_dtype)).float() for layout in parts)
    assert not torch.equal(low, high)
    # Each of up to 60 roundings is off by less than 2^-8 of the weight, either way.
    error = (low - high).abs() / (high.abs() + 0.02)
    assert error.mean() < 0.02
    assert torch.equal(low[-1], high[-1].to(torch.bfloat16).float())  # never updated: rounded to nearest


def test_another_seed_rounds_otherwise() -> None:
    config = OPTIMIZERS["rowwise_adagrad-exact"]
    layout = RecordLayout.of(DIM, config, "bf16")
    tables = []
    for seed in (1, 1, 2):
        table = layout.unpack(fresh_table(layout))
        RowUpdater(config, layout, seed=seed).update(table, gradient(0, ROWS), 0.1, torch.arange(ROWS))
        tables.append(table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize(("name", "row_dtype"), grid([*OPTIMIZERS], ["bf16", "fp32"]))
def test_a_saved_state_goes_on_with_the_same_bits(name: str, row_dtype: RowDtype) -> None:
    config = OPTIMIZERS[name]
    layout = RecordLayout.of(DIM, config, row_dtype)
    updater, table = RowUpdater(config, layout, seed=SEED), fresh_table(layout)
    everywhere = torch.arange(ROWS)
    for step in range(STEPS):
        rows = used_rows(step)
        read = updater.read(table, rows)
        updater.update_at(read, gradient(step, len(rows)) * 0.3, rate(step), ids(rows))
        if step % 13 == 0:
            state, updater = updater.state(), RowUpdater(config, layout, seed=SEED)
            updater.load_state(state)
    assert torch.equal(table.view(torch.int32), in_order(name, row_dtype).view(torch.int32))
    assert updater.read(table, everywhere).weights.tensor().shape == (ROWS, DIM)


@pytest.mark.parametrize(("name", "row_dtype"), [("adam-exact", "bf16"), ("adam-exact-bf16-state", "fp32")])
def test_bf16_rows_without_ids_are_refused(name: str, row_dtype: RowDtype) -> None:
    layout = RecordLayout.of(DIM, OPTIMIZERS[name], row_dtype)
    table, updater = fresh_table(layout), RowUpdater(OPTIMIZERS[name], layout)
    with pytest.raises(ValueError, match="rounded by their ids, but none are given"):
        updater.update(layout.unpack(table), torch.zeros(ROWS, DIM), 0.1)
    read = updater.read(table, torch.arange(ROWS))
    with pytest.raises(ValueError, match="rounded by their ids, but none are given"):
        updater.update_at(read, torch.zeros(ROWS, DIM), 0.1)


def test_another_state_dtype_is_refused_also_by_checkpoints_that_name_none() -> None:
    fp32, bf16 = (
        RowUpdater(config, RecordLayout.of(DIM, config))
        for config in (OPTIMIZERS["adam-exact"], OPTIMIZERS["adam-exact-bf16-state"])
    )
    old = fp32.state()
    del old["settings"]["offload.optimizer.state_dtype"]
    fp32.load_state(old)
    told = "offload.optimizer.state_dtype: the checkpoint's tables were trained with {}, the config says {}; restore"
    for state, updater, dtypes in ((old, bf16, ("fp32", "bf16")), (bf16.state(), fp32, ("bf16", "fp32"))):
        with pytest.raises(ValueError, match=told.format(*dtypes)):
            updater.load_state(state)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("offload.optimizer.beta1", {"beta1": 0.8}),
        ("offload.optimizer.beta2", {"beta2": 0.8}),
        ("offload.optimizer.eps", {"eps": 1e-6}),
        ("offload.optimizer.untouched_rows", {"untouched_rows": "lazy"}),
        ("offload.row_dtype", {"row_dtype": "bf16"}),
        ("model.engram.row_dim", {"dim": DIM + 1}),
        (None, {"lr_factor": 3.0}),
    ],
)
def test_settings_that_decide_what_a_record_means_may_not_change(key: str | None, change: dict[str, Any]) -> None:
    def made(dim: int = DIM, row_dtype: RowDtype = "fp32", **settings: Any) -> RowUpdater:
        config = OPTIMIZERS["adam-exact"].model_copy(update=settings)
        return RowUpdater(config, RecordLayout.of(dim, config, row_dtype))

    with pytest.raises(ValueError, match=f"^{key}: the checkpoint's") if key else nullcontext():
        made(**change).load_state(made().state())


@ALL
@DTYPES
def test_no_rows(name: str, row_dtype: RowDtype) -> None:
    layout = RecordLayout.of(DIM, OPTIMIZERS[name], row_dtype)
    updater, window = RowUpdater(OPTIMIZERS[name], layout), torch.zeros(3, layout.words)
    nothing = torch.zeros(0, dtype=torch.int64)
    updater.update_at(updater.read(window, nothing), torch.zeros(0, DIM), 0.1, nothing)
    assert not window.any()
    assert updater.state()["learning_rates"] == [0.5]
