"""Counts of updates, against a plain dictionary, with and without compiled loops."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import compiled_loops
from offload.window.update_counts import MOST, UpdateCounts

NUM_ROWS = 12
some_rows = st.lists(st.integers(0, NUM_ROWS - 1), unique=True).map(lambda rows: np.array(rows, np.int64))


@pytest.fixture(params=["compiled", "numpy"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(compiled_loops, "available", lambda: False)
    elif not compiled_loops.available():
        pytest.skip("no Numba here")


def opened() -> UpdateCounts:
    return UpdateCounts(NUM_ROWS, torch.device("cpu"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(some_rows, max_size=8), some_rows)
def test_rows_that_were_ever_updated_come_first_and_keep_their_order(
    loops: None, updates: list[np.ndarray], asked: np.ndarray
) -> None:
    counts, expected = opened(), dict.fromkeys(range(NUM_ROWS), 0)
    for rows in updates:
        counts.add(rows)
        for row in rows.tolist():
            expected[row] += 1
    assert counts.counts_R.tolist() == list(expected.values())
    rows, slots, updated = counts.updated_first(asked, asked + 100)
    old, fresh = ([row for row in asked.tolist() if bool(expected[row]) == known] for known in (True, False))
    assert rows.tolist() == old + fresh
    assert slots.tolist() == [row + 100 for row in old + fresh]
    assert updated == len(old)


def test_a_count_stays_at_its_most(loops: None) -> None:
    counts = opened()
    for _ in range(MOST + 3):
        counts.add(np.array([0, 5]))
    counts.add(np.array([7]))
    assert counts.counts_R.tolist() == [MOST if row in (0, 5) else int(row == 7) for row in range(NUM_ROWS)]


def test_an_empty_shard_has_no_counts(loops: None) -> None:
    counts, none = UpdateCounts(0, torch.device("cpu")), np.empty(0, np.int64)
    counts.add(none)
    assert counts.updated_first(none, none)[2] == len(counts.counts_R) == 0
