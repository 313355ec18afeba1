"""What several tests of the tables share."""

import pytest

from tests.offload.hazard_runs import CHEAP, THOROUGH, Runs, run_everything


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> Runs:
    """The hazard jobs on one to four ranks, run once."""
    return run_everything(THOROUGH if "long" in request.config.option.markexpr else CHEAP)
