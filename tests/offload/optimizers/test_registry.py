"""What is asked of every row optimizer in the list, and how the list reaches those who read it."""

import subprocess
import sys
from typing import get_args

import pytest

from offload.config import TableOptimizerConfig
from offload.optimizers import OPTIMIZERS
from offload.optimizers.row_optimizer import RowOptimizer

ALL = pytest.mark.parametrize("name", OPTIMIZERS)


def optimizer(name: str, untouched_rows: str) -> RowOptimizer:
    return OPTIMIZERS[name](TableOptimizerConfig(type=name, untouched_rows=untouched_rows))


def test_what_checkpoints_and_jobs_name_is_there() -> None:
    assert {"adam", "rowwise_adagrad", "rowwise_rmsprop", "sgd"} <= set(OPTIMIZERS)
    assert get_args(TableOptimizerConfig.model_fields["type"].annotation) == tuple(OPTIMIZERS)
    assert TableOptimizerConfig().type == "adam"


def test_the_key_says_what_each_keeps() -> None:
    description = TableOptimizerConfig.model_fields["type"].description
    assert description is not None
    assert all(f"`{name}` keeps {each.keeps}" in description for name, each in OPTIMIZERS.items())


@pytest.mark.parametrize(
    ("name", "state_words", "replays", "state_decay"),
    [
        ("adam", 160, True, None),
        ("rowwise_adagrad", 1, False, None),
        ("rowwise_rmsprop", 1, False, 0.95),
        ("sgd", 0, False, None),
    ],
)
def test_rules(name: str, state_words: int, replays: bool, state_decay: float | None) -> None:
    exact, lazy = optimizer(name, "exact"), optimizer(name, "lazy")
    assert exact.state_words(80) == state_words
    assert (exact.replays, exact.state_decay) == (replays, state_decay)
    assert (lazy.replays, lazy.state_decay) == (False, None)


@ALL
def test_a_decaying_state_is_one_word_and_moves_no_weights(name: str) -> None:
    if optimizer(name, "exact").state_decay is not None:
        assert OPTIMIZERS[name].state_words(80) == 1
        assert not OPTIMIZERS[name].moves_resting_rows


def test_reading_the_config_does_not_import_torch() -> None:
    code = "import sys, offload.config, launch.commands.bench; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
