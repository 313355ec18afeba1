"""A job's config: one section a room, each validated by the schema beside the code that it configures."""

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from model.config import ModelConfig
from offload.config import OffloadConfig
from train.config.deepspeed import DeepSpeedConfig
from train.config.launch import LaunchConfig
from train.config.report import ProfileConfig, WandbConfig
from train.data.config import DataConfig
from train.optim.optimizer import OptimizerConfig
from train.optim.schedule import ScheduleConfig


class RunConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """Where a run lives and how many processes it has."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """Name of the run: its folder in `dir`, and its name in Weights & Biases."""
    dir: str = "runs"
    """Folder of all runs."""
    local_checkpoints: bool = False
    """Each node keeps its ranks' parts of a checkpoint on a disk of its own, where `dir` is: for nodes that share no
    disk. A node that is gone takes its parts with it."""
    nproc: int | None = Field(None, ge=1)
    """Ranks that `engram train` starts on this machine, and `engram launch` on each node; null takes one a GPU, or 2
    without GPUs."""
    port: int | None = Field(None, ge=1, le=65535)
    """TCP port on which the ranks meet; null takes a free one."""


class TrainConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """The size and the arithmetic of a training step."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    seed: int = Field(0, ge=0)
    """Decides initial weights, table rows and data order."""
    global_batch_size: int = Field(16, ge=1)
    """Sequences in a step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1)
    """Sequences that a rank computes at once; what is left of its share of a step is accumulated."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the backbone. Master weights, optimizer state and table rows are fp32 either way."""
    gradient_clipping: float | None = Field(1.0, gt=0)
    """Largest norm of the raw gradient, backbone and tables together; null for none."""
    recompute: bool = False
    """Keep only what passes between the blocks for the backward pass, and compute each block a second time there
    (activation checkpointing): less memory, a third more arithmetic, the same results."""
    compile: bool = False
    """Compile each block with torch.compile: some minutes at the start, then faster steps. ZeRO stage 3 then gathers a
    block's parameters together. On a CPU it takes a C++ compiler."""
    on_non_finite: Literal["skip", "stop"] = "skip"
    """What becomes of a step whose gradient is not finite (NaN or infinity), backbone and tables together: `skip`
    leaves it without an update on every rank, `stop` ends the run, saved as it was before that step."""
    on_spike: Literal["ignore", "skip", "stop"] = "ignore"
    """The same for a step whose loss or gradient norm is more than `spike_sigma` standard deviations above the mean of
    the `spike_window` updates before it."""
    spike_sigma: float = Field(6.0, gt=0)
    """Standard deviations above the mean from which a loss or a gradient norm is a spike."""
    spike_window: int = Field(128, ge=2)
    """Updates that a step's loss and gradient norm are held against; until there are half as many, nothing is a
    spike."""
    max_skipped_steps: int = Field(10, ge=0)
    """Training stops after more than this many skipped steps in a row."""
    restarts: int = Field(0, ge=0)
    """Times that `engram train` starts its ranks again, from the last checkpoint that is whole, after one of them
    crashed or hung. Ranks of another launcher are started again by that launcher."""
    hang_s: float | None = Field(1800.0, gt=0)
    """Seconds without any progress after which a run is ended, and the rank named for which the others wait: more than
    a save takes. Counted from the end of the first step, which may compile. null: never."""
    log_every: int = Field(1, ge=1)
    """Steps between lines of progress and of metrics.jsonl. On a GPU each line waits for the step to end, so that the
    next one cannot be prepared meanwhile: 10 or more where steps are short."""
    profile: ProfileConfig | None = None
    """Some steps to record in the run's folder, kernel by kernel; null for none."""

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "TrainConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is no multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class EvalConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """Evaluation on the validation split, and the texts continued at the end."""

    every: int = Field(100, ge=1)
    """Steps between evaluations; there is always one at the end."""
    sequences: int = Field(64, ge=1)
    """Sequences of an evaluation; all of the validation split if it has fewer."""
    prompts: list[str] = ["def ", "import "]
    """Texts that the model continues at the end of the run."""
    sample_tokens: int = Field(40, ge=0)
    """Tokens of each continuation; 0 for none."""
    temperature: float = Field(0.8, ge=0)
    """Temperature at which tokens of the continuations are drawn; 0 always takes the likeliest."""


class CheckpointConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """When a run's state is saved, and whether a run goes on from it."""

    every: int | None = Field(100, ge=1)
    """Steps between checkpoints; there is always one at the end. null: none at all, for a run that is only measured."""
    every_minutes: float | None = Field(None, gt=0)
    """Also save when the last checkpoint was begun so many minutes ago. Such a checkpoint goes as soon as there is a
    newer good one, and does not count for `keep` and `keep_every`; null for none."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept. One that was saved while steps were skipped is not counted, and goes as soon as
    there is a newer one."""
    keep_every: int | None = Field(None, ge=1)
    """Checkpoints whose step is a multiple of this are kept for good; null for none."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, and waits only until the state is frozen. Takes host memory on
    each rank: its part of the backbone with its optimizer state, and `undo_bytes`. A run's last checkpoint is waited
    for."""
    undo_bytes: int = Field(1 << 30, ge=0)
    """Most bytes of table rows on each rank that are kept as they were while a checkpoint is written; when there are
    more, steps wait for the disk."""
    incremental: int | None = Field(None, ge=2)
    """One of so many checkpoints has all table rows that were ever updated, the others only those updated since that
    one, which stays as long as any of them; null: each has all."""
    init_from: str | None = None
    """Folder of a run, or one of its checkpoints, whose weights, tables and optimizer state this run begins with, at
    step 0 and with its own data, sequence length, schedule and `model.attention.rope_scaling`; null for none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` goes on from the newest checkpoint in the run's folder, if there is one; `never` wants a folder without
    any; `must` wants one."""
    grace_s: float = Field(30.0, gt=0)
    """Seconds that ranks have between the signal that asks them to end and SIGKILL."""
    interrupted_exit: int = Field(0, ge=0, le=125)
    """Exit code of a run that was interrupted by a signal and saved."""

    @model_validator(mode="after")
    def _minutes_are_for_what_is_saved(self) -> "CheckpointConfig":
        if self.every is None and self.every_minutes is not None:
            raise ValueError("every_minutes is set, but every is null, which is for no checkpoints at all: set both")
        return self


class JobConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True):
    """One training job."""

    run: RunConfig
    """Name and place."""
    model: ModelConfig
    """The network."""
    data: DataConfig = DataConfig()
    """The text."""
    train: TrainConfig
    """Steps, batches, arithmetic."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The backbone's optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate over the run."""
    offload: OffloadConfig = OffloadConfig()
    """The tables in host memory, and their optimizer."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    launch: LaunchConfig = LaunchConfig()
    """Nodes, for `engram launch`."""
    wandb: WandbConfig = WandbConfig()
    """Weights & Biases."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Passed through to DeepSpeed: ZeRO, expert parallelism."""
