"""Tables train where Numba is missing or refuses its NumPy, with the same bits."""

import subprocess
import sys
from pathlib import Path

from offload.config import OffloadConfig
from tests.offload.tables_job import Job, run_job

PROGRAM = """
from kernels import compiled_loops
from tests.offload.test_without_numba import digest
assert not compiled_loops.available()
print(digest())
"""


def digest() -> str:
    return run_job(Job(), OffloadConfig(depth=1, window_rows=400), stop=3).digest


def test_a_window_without_compiled_loops_has_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.9 or less')")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == digest()
