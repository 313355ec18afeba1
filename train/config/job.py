"""A job's config: a schema for each section; those of model, tables, data and optimizer are beside their code."""

import json
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from model.config import ModelConfig
from offload.config import OffloadConfig
from train.config.deepspeed import DeepSpeedConfig
from train.config.launch import LaunchConfig
from train.config.report import ProfileConfig, TensorBoardConfig, WandbConfig
from train.data.config import DataConfig
from train.data.phases import begun_at
from train.optim.optimizer import OptimizerConfig
from train.optim.schedule import ScheduleConfig


class RunConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Where a run is stored, and how many processes it has."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """Name of the run: its folder in `dir`, and its name in Weights & Biases."""
    dir: str = "runs"
    """Folder of all runs."""
    local_checkpoints: bool = False
    """Each node keeps its ranks' parts of a checkpoint on a disk of its own, where `dir` is: for nodes that share no
    disk. A node that is gone takes its parts with it."""
    nproc: int | None = Field(None, ge=1, le=4_096)
    """Ranks that `engram train` starts on this machine, and `engram launch` on each node; null means one per GPU, or 2
    without GPUs."""
    port: int | None = Field(None, ge=1, le=65535)
    """TCP port on which the ranks meet; null picks a free one."""


class TrainConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Size and arithmetic of a training step."""

    steps: int = Field(ge=1, le=1_000_000_000)
    """Optimizer steps of the whole run."""
    seed: int = Field(0, ge=0, le=2**63 - 1)
    """Decides initial weights, table rows and data order."""
    global_batch_size: int = Field(16, ge=1, le=10_000_000)
    """Sequences in a step, over all ranks."""
    micro_batch_size: int = Field(8, ge=1, le=10_000_000)
    """Sequences that a rank computes at once; gradients accumulate over its share of a step."""
    dtype: Literal["bf16", "fp32"] = "fp32"
    """Arithmetic of the backbone. Master weights and optimizer state are fp32 either way; `offload.row_dtype` is for
    table rows."""
    gradient_clipping: float | None = Field(1.0, gt=0)
    """Largest norm of the raw gradient of backbone and tables together; null: no clipping."""
    recompute: bool = False
    """Activation checkpointing: keep only the residual stream between blocks, and recompute each block in the backward.
    Less memory, a third more arithmetic, the same results."""
    compile: bool = False
    """Compile each block with torch.compile: some minutes at the start, then faster steps. ZeRO stage 3 then gathers a
    block's parameters together. On a CPU it needs a C++ compiler."""
    on_non_finite: Literal["skip", "stop"] = "skip"
    """What to do with a step whose gradient is not finite (NaN or infinity), in backbone or tables: `skip` applies no
    update on any rank, `stop` ends the run, saved as it was before that step."""
    on_spike: Literal["ignore", "skip", "stop"] = "ignore"
    """The same for a step whose loss or gradient norm is more than `spike_sigma` standard deviations above the mean of
    the `spike_window` updates before it."""
    spike_sigma: float = Field(6.0, gt=0)
    """Standard deviations above the mean beyond which a loss or gradient norm is a spike."""
    spike_window: int = Field(128, ge=2, le=1_000_000)
    """Updates that a step's loss and gradient norm are compared with; until there are half as many, nothing counts
    as a spike."""
    max_skipped_steps: int = Field(10, ge=0, le=1_000_000_000)
    """Training stops after more than this many skipped steps in a row."""
    restarts: int = Field(0, ge=0, le=1_000_000)
    """Times that `engram train` restarts its ranks from the newest intact checkpoint after one of them crashed or hung.
    Under another launcher, restarting is that launcher's job."""
    hang_s: float | None = Field(1800.0, gt=0, le=1_000_000_000)
    """Seconds without progress after which a run ends and names the rank that the others wait for; must be longer than
    a save. Counted from the end of the first step, which may compile. null: never."""
    flight_recorder: bool | None = None
    """Keep each rank's last 2000 operations with other ranks, and write them to `stacks` in the run's folder when the
    run hangs or one of NCCL's operations times out (PyTorch's flight recorder); null: on GPUs."""
    log_every: int = Field(1, ge=1, le=1_000_000_000)
    """Steps between progress lines and records of metrics.jsonl. On a GPU each one waits for the step to end, during
    which the next cannot be prepared: use 10 or more where steps are short."""
    peak_tflops: float | None = Field(None, gt=0)
    """Operations that a device could do, in 10^12 a second, which `mfu` in metrics.jsonl is a share of; null: what the
    data sheet of a known GPU says of bf16. Without either there is no `mfu`."""
    profile: ProfileConfig | None = None
    """Steps whose kernels are traced into the run's folder; null: none."""

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> "TrainConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}"
            )
        return self


class EvalConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Evaluation on the validation split, and the texts continued at the end."""

    every: int = Field(100, ge=1, le=1_000_000_000)
    """Steps between evaluations; there is always one at the end."""
    sequences: int = Field(64, ge=1, le=1_000_000_000)
    """Sequences per evaluation; all of the validation split if it has fewer."""
    prompts: list[str] = ["def ", "import "]
    """Texts that the model continues at the end of the run."""
    sample_tokens: int = Field(40, ge=0, le=1_000_000)
    """Tokens of each continuation; 0 for none."""
    temperature: float = Field(0.8, ge=0)
    """Sampling temperature of the continuations; 0 always takes the likeliest token."""


class CheckpointConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """When a run's state is saved, and what a run resumes from."""

    every: int | None = Field(100, ge=1, le=1_000_000_000)
    """Steps between checkpoints; there is always one at the end. null: none at all, for benchmarks."""
    every_minutes: float | None = Field(None, gt=0, le=10_000_000)
    """Also save when the last checkpoint began this many minutes ago. Such a checkpoint is removed as soon as there is
    a newer good one, and does not count for `keep` and `keep_every`; null: none."""
    keep: int = Field(2, ge=1, le=1_000_000)
    """How many of the newest checkpoints to keep. One saved right after skipped steps does not count, and is removed
    as soon as there is a newer one."""
    keep_every: int | None = Field(None, ge=1, le=1_000_000_000)
    """Checkpoints whose step is a multiple of this are kept permanently; null: none."""
    asynchronous: bool = True
    """Continue training while a checkpoint is written; it pauses only until the state is frozen. Takes host memory on
    each rank for its part of the backbone with its optimizer state, and for `undo_bytes`. The run waits for its last
    checkpoint."""
    undo_bytes: int = Field(1 << 30, ge=0, le=2**53)
    """Most bytes per rank for old versions of table rows while a checkpoint is written; beyond that, steps wait for
    the disk."""
    incremental: int | None = Field(None, ge=2, le=1_000_000)
    """Every n-th checkpoint has all table rows that were ever updated; the others have only those updated since that
    one, which is kept as long as any of them. null: each has all."""
    init_from: str | None = None
    """Folder of a run, or one of its checkpoints, whose weights, tables and optimizer state this run starts from, at
    step 0 and with its own data, sequence length, schedule and `model.attention.rope_scaling`; or a folder of Hugging
    Face's: an export, a DeepSeek-V3 (to which Engram may be added), or DeepSeek-V4.1 for its tables alone; see
    docs/serve.md. null: none."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto` resumes from the newest checkpoint in the run's folder, if there is one; `never` requires a folder
    without checkpoints, `must` one with a checkpoint."""
    grace_s: float = Field(30.0, gt=0, le=1_000_000_000)
    """Seconds between the signal that asks ranks to end and SIGKILL."""
    interrupted_exit: int = Field(0, ge=0, le=125)
    """Exit code of a run that was saved after a signal interrupted it."""

    @model_validator(mode="after")
    def _minutes_are_for_what_is_saved(self) -> "CheckpointConfig":
        if self.every is None and self.every_minutes is not None:
            raise ValueError("every_minutes is set, but every is null, which is for no checkpoints at all: set both")
        return self


class JobConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
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
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    """TensorBoard."""
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    """Passed through to DeepSpeed: ZeRO, expert parallelism."""

    @model_validator(mode="after")
    def _phases_ascend(self) -> "JobConfig":
        begun_at(self.data, self.train.global_batch_size)
        return self


def anchored(values: dict[str, Any]) -> dict[str, Any]:
    """What a config file says, with absolute paths, as a run has it; unchanged where `data` is no section by itself."""
    try:
        data = DataConfig.model_validate_json(json.dumps(values.get("data", {})))
    except ValidationError:  # a base may need what a file that extends it adds
        return values
    return values | {"data": data.anchored().model_dump(mode="json", exclude_unset=True)}
