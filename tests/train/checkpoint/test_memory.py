"""A save and a load take a bounded amount of memory, however large tables and backbone are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import free_port
from tests.train.checkpoint.memory_job import DIM

BOUND = 64 << 20
RECORD_BYTES = 4 * (3 * DIM + 1)


def run(action: str, folder: Path, rows: int, width: int) -> tuple[int, int]:
    """Bytes of the checkpoint, and of the memory that was needed for it at most."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tests.train.checkpoint.memory_job", action, str(folder), str(rows), str(width)]
    root = Path(__file__).parents[3]
    done = subprocess.run(
        command, env=os.environ | environment, cwd=root, capture_output=True, text=True, check=True, timeout=600
    )
    size, peak, _ = done.stdout.split()[-3:]
    return int(size), int(peak)


@pytest.mark.parametrize(
    ("table_bytes", "width"), [(160 << 20, 3000), pytest.param(2 << 30, 5000, marks=pytest.mark.long)]
)
def test_saving_and_loading_take_less_than_64_mib(table_bytes: int, width: int, tmp_path: Path) -> None:
    for action in ("save", "load"):
        size, peak = run(action, tmp_path, table_bytes // RECORD_BYTES, width)
        assert size > table_bytes + 12 * width**2
        assert peak < BOUND, (action, peak)
