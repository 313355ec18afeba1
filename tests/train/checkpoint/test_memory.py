"""A save and a load take a bounded amount of memory, however large tables and backbone are."""

from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.train.checkpoint.memory_job import DIM, measure

BOUND = 64 << 20
RECORD_BYTES = 4 * (3 * DIM + 1)


@pytest.mark.parametrize(
    ("table_bytes", "width"), [(100 << 20, 2600), pytest.param(2 << 30, 5000, marks=pytest.mark.long)]
)
def test_saving_and_loading_take_less_than_64_mib(table_bytes: int, width: int, tmp_path: Path) -> None:
    for action in ("save", "load"):
        ((size, peak),) = run_ranks(measure, 1, action, tmp_path, table_bytes // RECORD_BYTES, width)
        assert size > table_bytes + 12 * width**2
        assert peak < BOUND, (action, peak)
