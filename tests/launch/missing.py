"""Packages that are there, made to look as if they were not."""

import sys

import pytest


def hide_fbgemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every import of FBGEMM fail as it does where it is not installed."""
    loaded = [name for name in sys.modules if name.startswith("fbgemm_gpu.")]
    for name in ("fbgemm_gpu", *loaded):
        monkeypatch.setitem(sys.modules, name, None)
