"""Exports are loaded by the real library, which keeps the code that they bring in a folder of the test's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.huggingface.exports import Exported, make_export, make_run, own_code_cache


@pytest.fixture(scope="package", autouse=True)
def _own_cache() -> Iterator[None]:
    with own_code_cache():
        yield


@pytest.fixture(scope="package")
def engram_export(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of the run of two ranks, its tables in several files."""
    return make_export(trained, tmp_path_factory.mktemp("engram") / "model-hf", shard_bytes=10_000)


@pytest.fixture(scope="package")
def branched_export(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("branched")
    return make_export(make_run("branched", corpus, folder), folder / "hf")


@pytest.fixture(scope="package")
def plain_export(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("plain")
    return make_export(make_run("plain", corpus, folder), folder / "hf")


@pytest.fixture(params=["engram", "branched", "plain"])
def exported(request: pytest.FixtureRequest) -> Exported:
    """An export of each kind."""
    found: Exported = request.getfixturevalue(f"{request.param}_export")
    return found
