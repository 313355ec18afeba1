"""Numba is used where it works, and nothing breaks where it does not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import compiled_loops
from kernels.deduplicate import deduplicate


def test_a_numba_that_refuses_its_numpy_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1.9 or less')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "numba"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    compiled_loops.available.cache_clear()
    try:
        assert not compiled_loops.available()
        rows_U, (index,) = deduplicate([torch.tensor([5, 3, 5])])
        assert rows_U.tolist() == [3, 5]
        assert index.index_N.tolist() == [1, 0, 1]
    finally:
        compiled_loops.available.cache_clear()


TOTAL = """
from kernels.numba_intrinsics import compiled
from kernels.value import VALUE

@compiled
def total():
    return VALUE
"""


def test_what_is_compiled_follows_the_files_that_it_uses(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    shutil.copy(Path(compiled_loops.__file__).parent / "numba_intrinsics.py", tmp_path / "kernels")
    (tmp_path / "kernels" / "total.py").write_text(TOTAL)

    def total(value: int) -> str:
        (tmp_path / "kernels" / "value.py").write_text(f"VALUE = {value}")
        program = [
            sys.executable,
            "-c",
            "from kernels.total import total; print(total(), sum(total.stats.cache_hits.values()))",
        ]
        ran = subprocess.run(program, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    assert total(3) == "3 0"
    assert total(3) == "3 1", "nothing was kept"
    assert total(40) == "40 0"
