"""Rates of past steps, and the largest after any of them."""

from hypothesis import given
from hypothesis import strategies as st

from kernels.rows.rate_history import RateHistory

RATES = st.lists(st.sampled_from([0.0, 1e-3, 2e-3, 5e-3, 0.1]))


@given(RATES, RATES)
def test_peaks_are_those_of_a_search(saved: list[float], more: list[float]) -> None:
    history, rates = RateHistory(saved), saved + more
    for rate in more:
        history.append(rate)
    assert history.to_list() == rates
    assert [history[step] for step in range(1, len(history) + 1)] == rates
    for step in range(len(rates) + 2):
        assert history.peak_after(step) == max(rates[step:], default=0.0)
