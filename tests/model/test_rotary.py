"""YaRN with the paper's values, against the equations as DeepSeek's models use them."""

import math

import pytest
import torch

from model.config import RopeScalingConfig
from model.rotary import attention_scale, rotary_angles, rotary_frequencies

PAPER = RopeScalingConfig(factor=10.0, original_length=4096, alpha=1.0, beta=32.0, mscale=0.707)


def _pair_that_turns(times: float) -> float:
    """Bisects for the pair, as a real number, that turns so often in 4,096 tokens; more turns for lower pairs."""
    low, high = 0.0, 32.0
    for _ in range(60):
        pair = (low + high) / 2
        low, high = (pair, high) if 4096 * 10000 ** (-pair / 32) / (2 * math.pi) > times else (low, pair)
    return low


def test_frequencies_go_over_from_the_old_to_a_tenth_of_them_between_32_turns_and_one() -> None:
    first, last = math.floor(_pair_that_turns(32)), math.ceil(_pair_that_turns(1))
    assert (first, last) == (10, 23)
    plain, scaled = (rotary_frequencies(64, 10000.0, scaling).tolist() for scaling in (None, PAPER))
    for pair in range(32):
        assert plain[pair] == pytest.approx(10000 ** (-pair / 32))
        interpolated = min(max((pair - first) / (last - first), 0), 1)
        assert scaled[pair] / plain[pair] == pytest.approx(1 - 0.9 * interpolated), pair


def test_temperature() -> None:
    assert attention_scale(192) == pytest.approx(1 / math.sqrt(192))
    assert attention_scale(192, PAPER) * math.sqrt(192) == pytest.approx(1.352087, rel=1e-6)
    # DeepSeek-V2 itself: 1.2608 on either side of the product.
    v2 = PAPER.model_copy(update={"factor": 40.0})
    assert attention_scale(192, v2) == pytest.approx(0.11472138, rel=1e-6)


def test_angles_beyond_the_original_length() -> None:
    cosine, sine = rotary_angles(torch.tensor([[30000]]), 64, 10000.0, PAPER)
    slowest = 3000 * 10000.0 ** (-62 / 64)
    assert (cosine[0, 0, 31], sine[0, 0, 31]) == (
        pytest.approx(math.cos(slowest), abs=1e-6), pytest.approx(math.sin(slowest), abs=1e-6)
    )  # fmt: skip


def test_alpha_must_be_below_beta() -> None:
    with pytest.raises(ValueError, match="alpha must be below beta, but they are 32 and 1"):
        RopeScalingConfig(alpha=32.0, beta=1.0)
