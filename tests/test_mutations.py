"""Deliberate mistakes are caught (see `tests.mutations`), and the page that lists them is complete."""

import pytest

from tests.mutations import MUTATIONS, ROOT, Mutation, judge, verdict_of

NAMES = [mutation.name for mutation in MUTATIONS]


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_a_mutation_is_caught(mutation: Mutation) -> None:
    verdict = judge(mutation)
    assert verdict.outcome == "caught", verdict


@pytest.mark.parametrize("mutation", MUTATIONS, ids=NAMES)
def test_its_text_stands_once_in_its_file(mutation: Mutation) -> None:
    """Else it would be no mutation: write it anew when the code has changed."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert (ROOT / mutation.tests).exists()


@pytest.mark.parametrize("name", NAMES)
def test_each_is_in_the_table_of_what_caught_it(name: str) -> None:
    assert f"| {name} |" in (ROOT / "docs" / "hazards.md").read_text()


def test_only_a_failed_test_counts_as_caught() -> None:
    assert verdict_of(0, "1 passed") == ("survived", "")
    assert verdict_of(1, "FAILED tests/a.py::test_b - AssertionError") == ("caught", "tests/a.py::test_b")
    assert verdict_of(2, "ERROR tests/a.py - SyntaxError").outcome.startswith("pytest could not run")
    assert verdict_of(5, "no tests ran").outcome.startswith("pytest could not run")


def test_a_text_that_is_gone_is_told() -> None:
    gone = Mutation("gone", "tests/mutations.py", "no such" + " text", "", "tests/test_mutations.py")
    assert "0 times in tests/mutations.py" in judge(gone).outcome
