"""SGD on records, beside PyTorch's on a dense table."""

import pytest
import torch

from offload.config import RowDtype, TableOptimizerConfig
from offload.rows.records import RecordLayout
from offload.rows.updater import RowUpdater

DIM, ROWS, STEPS = 5, 30, 40


def used(step: int) -> torch.Tensor:
    return torch.randperm(ROWS - 1, generator=torch.Generator().manual_seed(step))[: step % 9]


def gradient(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(step % 9, DIM, generator=generator) * 10 ** torch.randn(step % 9, 1, generator=generator)


def initial() -> torch.Tensor:
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))


def trained(
    lr: float, row_dtype: RowDtype = "fp32", untouched_rows: str = "exact"
) -> tuple[torch.Tensor, RecordLayout]:
    """The records of a table in random slots, in the order of its rows, after all steps."""
    config = TableOptimizerConfig(type="sgd", lr_factor=4.0, untouched_rows=untouched_rows)
    layout = RecordLayout.of(DIM, config, row_dtype)
    updater, window = RowUpdater(config, layout, seed=3), torch.zeros(2 * ROWS, layout.words)
    slots = torch.randperm(2 * ROWS, generator=torch.Generator().manual_seed(1))[:ROWS]
    layout.weights(window)[slots] = initial().to(layout.weights(window).dtype)
    for step in range(STEPS):
        rows = used(step)
        read = updater.read(window, slots[rows])
        assert torch.equal(read.weights.tensor(), layout.weights(window)[slots[rows]].float())
        updater.update_at(read, gradient(step), lr * (1 + step % 2), rows + 2**40, gradient_scale=0.5)
    return window[slots], layout


def dense(lr: float) -> torch.Tensor:
    """The same by `torch.optim.SGD` on all rows at every step."""
    table = torch.nn.Parameter(initial())
    optimizer = torch.optim.SGD([table], lr=1.0)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 4 * lr * (1 + step % 2)
        table.grad = torch.zeros(ROWS, DIM).index_copy_(0, used(step), gradient(step) * 0.5)
        optimizer.step()
    return table.detach()


def test_rates_whose_products_are_exact_give_the_bits_of_pytorchs_sgd() -> None:
    records, layout = trained(2.0**-7)
    assert torch.equal(layout.weights(records), dense(2.0**-7))


def test_other_rates_follow_pytorchs_sgd() -> None:
    records, layout = trained(0.003)
    torch.testing.assert_close(layout.weights(records), dense(0.003), rtol=1e-6, atol=1e-6)
    assert not torch.equal(layout.weights(records), initial())


def test_bf16_rows_follow_at_their_precision_and_keep_what_rounding_to_nearest_would_lose() -> None:
    records, layout = trained(2.0**-7, "bf16")
    expected = dense(2.0**-7)
    error = (layout.weights(records).float() - expected).abs() / (expected.abs() + 0.1)
    assert 0 < error.mean() < 0.01


@pytest.mark.parametrize("row_dtype", ["fp32", "bf16"])
def test_a_record_is_weights_and_version_and_untouched_rows_has_no_effect(row_dtype: RowDtype) -> None:
    records, layout = trained(0.01, row_dtype)
    assert layout.words == (DIM if row_dtype == "fp32" else 3) + 1
    last = torch.zeros(ROWS, dtype=torch.int32)
    for step in range(STEPS):
        last[used(step)] = step + 1
    assert torch.equal(layout.version(records), last)
    lazy, _ = trained(0.01, row_dtype, "lazy")
    assert torch.equal(records.view(torch.int32), lazy.view(torch.int32))
