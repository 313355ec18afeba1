"""Each rule of the tables, broken on purpose, is noticed by the hazard job that is there for it (docs/hazards.md)."""

from dataclasses import replace

import pytest

from offload.config import TableOptimizerConfig
from tests.offload import broken_rules
from tests.offload.hazard_job import Case, Outcome, run_case
from tests.offload.hazard_reference import reference_rows
from tests.offload.hazard_runs import JOBS, variants

ADAM = TableOptimizerConfig()
RULES = {
    broken_rules.fetch_from_a_row_in_write_back: "returning",
    broken_rules.dirt_forgotten: "periodic",
    broken_rules.initial_values_not_drawn: "periodic",
    broken_rules.updates_not_counted: "periodic",
    broken_rules.resurrection_dropped: "returning",
    broken_rules.write_back_not_waited_for: "returning",
    broken_rules.needed_rows_evicted: "churn",
    broken_rules.slot_reused_before_its_write_back_landed: "churn",
    broken_rules.fetch_not_waited_for: "churn",
    broken_rules.applied_twice: "periodic",
    broken_rules.first_micro_batch_forgotten: "quadratic",
    broken_rules.skipped_step_applied: "skips",
    broken_rules.skipped_step_counted: "skips",
    broken_rules.stale_look_up: "skips",
    broken_rules.saved_without_the_window: "saves",
    broken_rules.replay_skipped: "churn",
    broken_rules.replay_at_the_latest_rate: "churn",
}
"""The jobs in which they are noticed on one rank."""


def noticed(case: Case, expected: Outcome) -> str:
    """How a case differs from what is expected; "" if it does not."""
    try:
        found = run_case(case)
    except Exception as error:
        return repr(error)
    images = [image.rows for image in found.images] != [image.rows for image in expected.images]
    return "other bits" if found.bits != expected.bits or images else ", ".join(found.leaks)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_broken_rule_is_noticed(rule: broken_rules.Rule) -> None:
    resident, *windows = variants(JOBS[RULES[rule]], 1)
    expected = run_case(resident)
    assert expected.rows == reference_rows(resident.job, ADAM, 1)
    assert any(noticed(replace(case, broken=rule.__name__), expected) for case in windows)
