"""Numba is used where it works, and nothing breaks where it does not."""

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
