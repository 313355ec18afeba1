import math

import pytest

from train.spikes import Spikes

CALM = [(2.0 + 0.1 * (-1) ** step, 1.0 + 0.05 * (-1) ** step) for step in range(8)]
"""Losses of mean 2 and deviation 0.1, norms of mean 1 and deviation 0.05."""


def test_what_is_far_above_the_updates_before_is_a_spike() -> None:
    spikes = Spikes(6.0, 8, CALM)
    assert spikes.why(2.59, 1.29) is None
    assert spikes.why(2.61, 1.29) == "its loss 2.61 is a spike: the 8 updates before had 2 ± 0.1"
    assert spikes.why(2.59, 1.31) == "its gradient norm 1.31 is a spike: the 8 updates before had 1 ± 0.05"
    assert spikes.why(0.1, 0.1) is None, "far below is none"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_spike(loss: float) -> None:
    assert "is a spike" in str(Spikes(6.0, 8, CALM).why(loss, 1.0))


def test_nothing_is_a_spike_until_half_the_window_is_known_and_what_is_old_does_not_count() -> None:
    spikes = Spikes(1.0, 4)
    spikes.add(1.0, 1.0)
    assert spikes.why(100.0, 1.0) is None
    spikes.add(1.0, 1.0)
    assert spikes.why(100.0, 1.0) is not None
    for _ in range(4):
        spikes.add(100.0, 1.0)
    assert spikes.why(100.0, 1.0) is None
    assert spikes.recent == [(100.0, 1.0)] * 4
