"""What a network's products take on one core: for `launch.calibrate.machine`."""

import statistics
import time
from collections.abc import Callable

import torch

from launch.plan.launches import launch_count
from launch.plan.memory.backbone import mean_columns
from model.census import count_model
from model.config import ModelConfig
from model.flops import flops_per_token
from model.transformer import LanguageModel

ROUNDS = 9
WIDTHS = (128, 384)
SEQUENCES = 16
_LENGTH = 128


def typical(work: Callable[[], object]) -> float:
    """Seconds of a round, after one that does not count."""
    work()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return max(statistics.median(times), 1e-9)


class Network:
    """Forward and backward of a small dense network, timed.

    Attributes:
        columns: of its matrices.
        seconds_each: of an operation.
        launch_seconds: of Python and PyTorch for each launch.
    """

    def __init__(self, width: int) -> None:
        self._config = ModelConfig(vocab_size=1024, hidden_size=width, num_layers=3, dense_hidden_size=3 * width)
        self._model = LanguageModel(self._config)
        operations = _LENGTH * flops_per_token(self._config, count_model(self._model), _LENGTH).total
        few, many = (typical(self.work(sequences)) for sequences in (1, SEQUENCES))
        self.columns = mean_columns(self._model)
        self.seconds_each = max(1e-9, many - few) / (SEQUENCES - 1) / operations
        launches = launch_count(self._config, _LENGTH)
        self.launch_seconds = max(1e-7, few - operations * self.seconds_each) / launches

    def work(self, sequences: int) -> Callable[[], object]:
        """Forward and backward."""
        tokens_BT = torch.randint(self._config.vocab_size, (sequences, _LENGTH))
        positions_BT = torch.arange(_LENGTH).expand(sequences, _LENGTH)
        return lambda: self._model(tokens_BT, positions_BT, (), tokens_BT).backward()
