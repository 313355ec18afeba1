"""The norm of rows' gradients."""

import pytest
import torch

from kernels.rows.squared_norm import squared_norm


@pytest.mark.parametrize("dim", [1, 7, 8, 24, 80])
def test_it_is_that_of_all_rows_at_any_number_of_threads(dim: int) -> None:
    rows = torch.randn(3000, dim, generator=torch.Generator().manual_seed(dim))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(squared_norm(rows))
    finally:
        torch.set_num_threads(threads)
    assert found[0].dtype == torch.float64
    assert found[0] == found[1] == found[2]
    torch.testing.assert_close(found[0], rows.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_seen(value: float) -> None:
    rows = torch.zeros(5, 13)
    rows[3, 11] = value
    assert not squared_norm(rows).isfinite()


def test_no_rows() -> None:
    assert squared_norm(torch.zeros(0, 4)) == 0
