"""What a job may say about how a run reports on itself."""

from typing import Literal

from pydantic import BaseModel, Field


class WandbConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What is sent to Weights & Biases."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """`offline` writes into the run's folder and needs no account. `wandb sync RUN/wandb` sends it later, all starts of
    the run as one, with wandb 0.30 or newer."""
    project: str = Field(default="engram-pretrain", min_length=1)
    """Project that the run appears in."""
    entity: str | None = None
    """User or team that owns the project; null: the account's default."""
    name: str | None = None
    """Name shown for the run; null: `run.name`."""


class TensorBoardConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What is written for TensorBoard."""

    enabled: bool = False
    """Write every number of metrics.jsonl into the run's folder, for `tensorboard --logdir runs`."""


class ProfileConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Which steps are recorded, on all ranks, in `trace.json.gz`."""

    first: int = Field(ge=1, le=1_000_000_000)
    """The first of them, counted from 1; one that follows a few others, so that kernels are compiled."""
    steps: int = Field(3, ge=1, le=1_000_000_000)
    """How many. What comes after the run's last step is not recorded."""
    ranks: int | None = Field(None, ge=1, le=1_000_000)
    """Only the first so many ranks; null: all. One of a GPU takes a megabyte or so a step."""
