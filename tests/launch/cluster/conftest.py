"""Two hosts, and the folder that they share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster.shared_job import Folders
from tests.launch.cluster.two_hosts import Host, skip_without_namespaces, two_hosts


@pytest.fixture
def shared(corpus: Path, tmp_path: Path) -> Path:
    """A folder that the hosts share, with the corpus and the job in it."""
    skip_without_namespaces()
    shutil.copytree(corpus, tmp_path / "corpus")
    return tmp_path


@pytest.fixture
def hosts(shared: Path) -> Iterator[tuple[Host, Host]]:
    with two_hosts(shared) as both:
        yield both


@pytest.fixture(params=[False, True], ids=["one-disk", "own-disks"])
def folders(request: pytest.FixtureRequest, shared: Path) -> Folders:
    return Folders(shared, request.param)
