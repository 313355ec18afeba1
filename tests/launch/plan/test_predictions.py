"""What the table of predictions says of itself. Its runs take minutes: `python -m tests.launch.plan.predictions`."""

import os
from unittest import mock

import pytest

from tests.launch.plan.compared import Case, Compared, Found, table, told, written
from tests.launch.plan.predictions import CASES, OtherWork, chosen
from tests.launch.plan.scale_page import put

GOOD = Compared(Case("tiny", "none", 1), Found(115, 5, 109), Found(100, 0, 100))
BAD = Compared(Case("tiny", "20 MB/s", 2), Found(116, 6, 89), Found(100, 0, 100), 0.25)


def test_a_case_further_off_than_a_goal_is_told_to_miss_it() -> None:
    assert (GOOD.within, GOOD.met) == ((True, True, True), True)
    assert (BAD.within, BAD.met) == ((False, False, False), False)
    assert not BAD._replace(says=Found(115.2, 0, 100)).met, "15.2 % is not 15 %"
    lines = told([GOOD, BAD])
    assert lines == [
        "step (15%): 1 of 2 met; not tiny,20 MB/s,2 +16%",
        "stall (5% of the step): 1 of 2 met; not tiny,20 MB/s,2 +6%",
        "memory (10%): 1 of 2 met; not tiny,20 MB/s,2 -11%",
    ]


def test_a_written_table_is_read_again_and_says_what_is_missing() -> None:
    page = put("a\n<!-- p -->\n\n<!-- /p -->\nz", "p", table([GOOD, BAD], 12))
    assert written(page, "p") == [GOOD, BAD]
    assert "10 of 12 cases were not run" in page
    assert "not run" not in table([GOOD, BAD], 2)


def test_what_others_take_of_the_machine_is_what_children_do_not() -> None:
    others = OtherWork()
    with mock.patch.object(OtherWork, "_now", return_value=(15.0, 5.0, 10.0)):
        others._before = (5.0, 1.0, 5.0)
        assert others.share() == pytest.approx(6 / (5 * (os.cpu_count() or 1)))


def test_cases_are_chosen_by_their_first_parts() -> None:
    assert chosen([]) == CASES
    assert chosen(["wide,none,2"]) == [Case("wide", "none", 2)]
    assert {case.shape for case in chosen(["tiny", "memory"])} == {"tiny", "memory"}
    assert len(chosen(["tiny"])) == 6
    with pytest.raises(SystemExit, match="no case 'tin'"):
        chosen(["tin"])
