"""What is asked of every row optimizer in the list, and how the list reaches those who read it."""

import subprocess
import sys
from itertools import product
from typing import Literal, get_args

import pytest
import torch

from kernels import compiled_loops
from kernels.rows.rate_history import RateHistory
from offload.config import TableOptimizerConfig
from offload.optimizers import OPTIMIZERS
from offload.optimizers.row_optimizer import RowOptimizer, StoredRows

ALL = pytest.mark.parametrize("name", OPTIMIZERS)


def optimizer(name: str, untouched_rows: str) -> RowOptimizer:
    return OPTIMIZERS[name](TableOptimizerConfig(type=name, untouched_rows=untouched_rows))


def test_what_checkpoints_and_jobs_name_is_there() -> None:
    assert {"adam", "rowwise_adagrad", "rowwise_rmsprop", "sgd"} <= set(OPTIMIZERS)
    assert get_args(TableOptimizerConfig.model_fields["type"].annotation) == tuple(OPTIMIZERS)
    assert TableOptimizerConfig().type == "adam"


def test_the_key_says_what_each_keeps() -> None:
    description = TableOptimizerConfig.model_fields["type"].description
    assert description == (
        "`adam` keeps two moments an element; `rowwise_adagrad` keeps one number a row; `rowwise_rmsprop` keeps one "
        "number a row; `sgd` keeps nothing."
    )


@pytest.mark.parametrize(
    ("name", "state_size", "replays", "state_decay"),
    [
        ("adam", 160, True, None),
        ("rowwise_adagrad", 1, False, None),
        ("rowwise_rmsprop", 1, False, 0.95),
        ("sgd", 0, False, None),
    ],
)
def test_rules(name: str, state_size: int, replays: bool, state_decay: float | None) -> None:
    exact, closed, lazy = (optimizer(name, untouched_rows) for untouched_rows in ("exact", "closed", "lazy"))
    assert exact.state_size(80) == state_size
    assert (exact.replays, exact.state_decay) == (replays, state_decay)
    assert (closed.replays, closed.state_decay) == (replays, state_decay)
    assert (lazy.replays, lazy.state_decay) == (False, None)


@ALL
def test_a_decaying_state_is_one_number_and_moves_no_weights(name: str) -> None:
    if optimizer(name, "exact").state_decay is not None:
        assert OPTIMIZERS[name].state_size(80) == 1
        assert not OPTIMIZERS[name].moves_resting_rows


@pytest.mark.parametrize("untouched_rows", ["exact", "closed", "lazy"])
@ALL
def test_every_record_has_a_compiled_pass(name: str, untouched_rows: Literal["exact", "closed", "lazy"]) -> None:
    assert compiled_loops.available()
    for state_dtype, bf16 in product(OPTIMIZERS[name].state_dtypes, (False, True)):
        config = TableOptimizerConfig(type=name, untouched_rows=untouched_rows, state_dtype=state_dtype)
        stored = StoredRows(bf16, 0, torch.device("cpu"))
        assert OPTIMIZERS[name](config).compiled(RateHistory(), stored) is not None, (state_dtype, bf16)


@pytest.mark.parametrize(
    "change", [{"beta1": 0.95, "beta2": 0.95}, {"beta1": 0.4}, {"beta1": 0.5, "beta2": 0.8}, {"eps": 1e-13}], ids=str
)
def test_settings_under_which_gaps_have_no_closed_form_are_refused(change: dict[str, float]) -> None:
    assert TableOptimizerConfig(**change)
    assert TableOptimizerConfig(type="rowwise_rmsprop", untouched_rows="closed", **change)
    with pytest.raises(ValueError, match="untouched_rows=closed requires beta2"):
        TableOptimizerConfig(untouched_rows="closed", **change)


@ALL
def test_a_state_dtype_that_an_optimizer_does_not_keep_is_refused(name: str) -> None:
    assert "fp32" in OPTIMIZERS[name].state_dtypes
    if "bf16" not in OPTIMIZERS[name].state_dtypes:
        with pytest.raises(ValueError, match=f"type={name} keeps its state in fp32 only: set state_dtype to fp32"):
            TableOptimizerConfig(type=name, state_dtype="bf16")


def test_reading_the_config_does_not_import_torch() -> None:
    code = "import sys, offload.config, launch.commands.bench; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
