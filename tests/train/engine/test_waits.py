"""DeepSpeed makes the host wait for the device nowhere in a step: counted on a CPU, where every wait is a call too."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.train.engine.test_engine import build
from tests.train.reference import Toy, micro_batch

CASES = list(product((0, 1, 2, 3), ("fp32", "bf16"), (1, 4)))
WARM_STEPS, STEPS = 3, 2  # DeepSpeed's throughput timer sleeps through the first two


class _ReadNumbers(TorchDispatchMode):
    """Counts the numbers that are read from tensors, by the place in Python that reads them."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.places[f"number read in {_caller()}"] += 1
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost frame that is neither of torch nor of this file."""
    frame = sys._getframe(1)
    torch_folder = str(Path(torch.__file__).parent)
    while frame.f_back and (frame.f_code.co_filename.startswith(torch_folder) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts what would make the host wait for a GPU: synchronisation of any kind, and numbers that are read."""
    from deepspeed.accelerator import get_accelerator

    places: Counter[str] = Counter()

    def count(what: str) -> Any:
        return lambda *_, **__: places.update([f"{what} in {_caller()}"])

    with (
        mock.patch.object(type(get_accelerator()), "synchronize", count("synchronize")),
        mock.patch.object(torch.cuda, "synchronize", count("synchronize")),
        mock.patch.object(torch.cuda.Stream, "synchronize", count("Stream.synchronize")),
        mock.patch.object(torch.cuda.Event, "synchronize", count("Event.synchronize")),
        _ReadNumbers(places),
    ):
        yield places


def waits_of_a_step() -> dict[tuple[int, str, int], Counter[str]]:
    found = {}
    for stage, dtype, accumulation in CASES:
        torch.manual_seed(0)
        engine = build(Toy(), (stage, dtype, "adamw", "none"), accumulation_steps=accumulation)
        for step in range(WARM_STEPS):
            one_step(engine, step, accumulation)
        with counted() as places:
            for step in range(WARM_STEPS, WARM_STEPS + STEPS):
                one_step(engine, step, accumulation)
        found[stage, dtype, accumulation] = places
        engine.close()
    return found


def one_step(engine: Any, step: int, accumulation: int) -> None:
    for number in range(accumulation):
        tokens, labels, memory = micro_batch(step, number, dist.get_rank())
        engine.backward(engine(tokens, labels, memory) / accumulation)
    engine.gradient_norm_squared()
    engine.step(lr_factor=1.0)


def test_the_gradients_norm_is_the_one_thing_that_a_step_waits_for() -> None:
    (found,) = run_ranks(waits_of_a_step, 1)
    expected = {"number read in engine.py:gradient_norm_squared": STEPS}
    assert {case: places for case, places in found.items() if places != expected} == {}
