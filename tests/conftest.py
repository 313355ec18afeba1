"""What many tests need: a small prepared corpus of real text."""

import sysconfig
from pathlib import Path

import pytest

from tests.command_line import engram

MODULES = ("argparse", "ast", "bisect", "configparser", "csv", "dataclasses", "difflib", "functools", "gzip", "heapq")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten modules of the standard library, prepared by the real command with a vocabulary of 300."""
    folder = tmp_path_factory.mktemp("corpus") / "prepared"
    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [stdlib / f"{name}.py" for name in MODULES]
    result = engram("data", "prepare", *sources, "--out", folder, "--train-bpe", "300")
    assert result.returncode == 0, result.stderr
    return folder
