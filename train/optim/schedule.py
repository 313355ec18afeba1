"""Learning-rate schedules: a pure function from the step number to a factor on every base learning rate."""

import math
from typing import Literal

from pydantic import BaseModel, Field, model_validator


class Milestone(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """One step of a `step_decay` schedule."""

    at: float = Field(gt=0, lt=1)
    """Fraction of all steps from which on this ratio holds."""
    ratio: float = Field(gt=0, le=1)
    """Learning rate from there on, as a fraction of the peak."""


class ScheduleConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """How the learning rate moves over a run. All learning rates, the tables' included, follow the same factor."""

    shape: Literal["cosine", "constant", "step_decay"] = "cosine"
    """What follows the warm-up: a half cosine down to `min_ratio`, nothing, or the `milestones`."""
    warmup_steps: int = Field(100, ge=0, le=1_000_000_000)
    """Steps of linear warm-up from (almost) zero to the peak."""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """Where the cosine ends, as a fraction of the peak; the other shapes do not use it."""
    milestones: list[Milestone] = Field(default=[Milestone(at=0.8, ratio=0.316), Milestone(at=0.9, ratio=0.1)])
    """Steps of `step_decay`, in rising order of `at`. The default is that of DeepSeek LLM (Bi et al. 2024)."""

    @model_validator(mode="after")
    def _rising(self) -> "ScheduleConfig":
        fractions = [milestone.at for milestone in self.milestones]
        if fractions != sorted(set(fractions)):
            raise ValueError(f"milestones must have rising values of `at`, not {fractions}")
        if self.shape == "step_decay" and not self.milestones:
            raise ValueError("shape step_decay needs at least one milestone, such as {at: 0.8, ratio: 0.316}")
        return self


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor on the peak learning rate for `step`, counted from 0, of a run of `total_steps` steps.

    Depends on nothing else, so a resumed run continues on the same curve. From `total_steps` on the last value stays.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.shape == "cosine":
        decay_steps = max(1, total_steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / decay_steps)
        return config.min_ratio + (1 - config.min_ratio) * (1 + math.cos(math.pi * progress)) / 2
    if config.shape == "step_decay":
        passed = [milestone.ratio for milestone in config.milestones if step >= milestone.at * total_steps]
        return passed[-1] if passed else 1.0
    return 1.0
