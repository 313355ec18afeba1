"""How much a micro-batch gives a GPU to do: the host needs time for each launch, whatever the sizes."""

from collections import Counter
from pathlib import Path
from unittest import mock

import pytest

from tests.model.launches import launches
from train.config.file import load
from train.config.job import JobConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def of_a_micro_batch(name: str) -> Counter[str]:
    job = load(CONFIGS / name, [], JobConfig)
    return launches(job.model, job.train.micro_batch_size * job.data.sequence_length)


@pytest.mark.parametrize(("name", "most"), [("bench.yaml", 3_000), ("paper/engram-27b.yaml", 12_000)])
def test_a_micro_batch_launches_no_more_than_it_may(name: str, most: int) -> None:
    assert of_a_micro_batch(name).total() <= most


def test_without_one_of_the_kernels_for_branches_it_would_launch_more_than_it_may() -> None:
    with mock.patch("kernels.branches.sinkhorn._fused", return_value=False):
        assert of_a_micro_batch("bench.yaml").total() > 3_000
