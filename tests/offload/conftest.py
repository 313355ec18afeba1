"""What several tests of the tables share."""

import pytest

from tests.offload.hazard_runs import Runs, run_everything


@pytest.fixture(scope="session")
def runs() -> Runs:
    """The hazard jobs on one to four ranks, run once."""
    return run_everything()
