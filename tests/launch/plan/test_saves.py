"""What a checkpoint of a job comes to."""

import pytest

from launch.plan.cluster import Cluster
from launch.plan.hardware import read_catalogue
from tests.command_line import JOB
from tests.launch.plan.checkpoint_page import MARK, PAGE, table
from tests.launch.plan.saves import SavedBytes
from tests.launch.plan.scale_page import put
from train.config.job import JobConfig


def test_bytes_of_a_rank_are_those_of_its_rows_and_of_its_part_of_the_backbone() -> None:
    job = JobConfig.model_validate(JOB | {"run": {"name": "x"}, "data": {"path": "x"}})
    one, two = (SavedBytes.of(job, Cluster(1, ranks, read_catalogue().gpu("h100"), None)) for ranks in (1, 2))
    primes = (503, 509, 521, 523, 541, 547, 557, 563)
    # Of a row: four weights, eight numbers of Adam's and a version in fp32, its id and its count.
    assert one.rows == sum(primes) * (4 * (4 + 8 + 1) + 8 + 1)
    assert one.rows == pytest.approx(2 * two.rows, rel=0.01)
    assert one.backbone == pytest.approx(2 * two.backbone, abs=2)
    # Of two pieces and files or of one: no more than a few entries.
    assert 0 < one.index <= two.index < 10_000


@pytest.mark.long
def test_the_table_of_the_page_is_of_this_code() -> None:
    assert put(PAGE.read_text(), MARK, table()) == PAGE.read_text()
