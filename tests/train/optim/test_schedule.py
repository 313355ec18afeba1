import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from train.optim.clipping import clip_scale
from train.optim.schedule import Milestone, ScheduleConfig, lr_factor

SHAPES = st.sampled_from(["cosine", "constant", "step_decay"])


def test_warm_up_is_linear_and_ends_at_the_peak():
    config = ScheduleConfig(warmup_steps=4)
    assert [lr_factor(config, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_passes_its_middle_halfway_and_ends_at_the_floor():
    config = ScheduleConfig(warmup_steps=10, min_ratio=0.2)
    assert lr_factor(config, 60, 110) == pytest.approx(0.6)
    assert lr_factor(config, 35, 110) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(config, 110, 110) == pytest.approx(0.2)
    assert lr_factor(config, 500, 110) == pytest.approx(0.2)


def test_step_decay_has_the_ratios_of_the_paper_at_its_fractions():
    config = ScheduleConfig(shape="step_decay", warmup_steps=0)
    factors = [lr_factor(config, step, 1000) for step in (0, 799, 800, 899, 900, 999)]
    assert factors == [1.0, 1.0, 0.316, 0.316, 0.1, 0.1]


def test_constant_stays():
    config = ScheduleConfig(shape="constant", warmup_steps=2)
    assert {lr_factor(config, step, 10) for step in range(2, 30)} == {1.0}


@given(shape=SHAPES, warmup=st.integers(0, 50), total=st.integers(1, 200), min_ratio=st.floats(0.01, 1))
def test_never_leaves_the_range_and_never_rises_after_the_warm_up(shape, warmup, total, min_ratio):
    config = ScheduleConfig(shape=shape, warmup_steps=warmup, min_ratio=min_ratio)
    factors = [lr_factor(config, step, total) for step in range(total + 2)]
    assert all(0 < factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert all(now >= later - 1e-12 for now, later in itertools.pairwise(after))


def test_milestones_must_rise():
    with pytest.raises(ValidationError, match="rising"):
        ScheduleConfig(milestones=[Milestone(at=0.9, ratio=0.1), Milestone(at=0.8, ratio=0.3)])


def test_step_decay_without_milestones_is_refused():
    with pytest.raises(ValidationError, match="at least one milestone"):
        ScheduleConfig(shape="step_decay", milestones=[])


@pytest.mark.parametrize(("norm_squared", "limit", "scale"), [(16.0, 1.0, 0.25), (0.25, 1.0, 1.0), (16.0, None, 1.0)])
def test_clip_scale(norm_squared, limit, scale):
    assert clip_scale(norm_squared, limit) == scale


@pytest.mark.parametrize("norm_squared", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_never_scaled(norm_squared):
    with pytest.raises(ValueError, match="skip the step"):
        clip_scale(norm_squared, 1.0)
