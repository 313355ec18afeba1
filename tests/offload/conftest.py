"""What several tests of the tables share."""

import os

import pytest

from tests.offload.hazard_runs import Runs, once_for_all_workers, run_everything


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The hazard jobs on one to four ranks, run once, though several processes may share the tests."""
    folder = tmp_path_factory.getbasetemp()
    return once_for_all_workers(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder, run_everything)
