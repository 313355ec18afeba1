"""The `deepspeed` section of a job: what passes through to DeepSpeed 0.19.8, what is refused, and the full config.

Every value that we rely on is written into the config, defaults included: two defaults changed between DeepSpeed 0.18
and 0.19. A contract test compares the names and defaults here with the installed version.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from train.config.deepspeed_keys import OWNED_KEYS, UNSUPPORTED_EXPERT_KEYS, UNSUPPORTED_KEYS, UNSUPPORTED_ZERO_KEYS
from train.errors import UserError


class OffloadOptimizerConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Where the backbone's master weights and optimizer state live, and so where its optimizer runs (ZeRO 1 to 3)."""

    device: Literal["none", "cpu"] = "none"
    """`none`: the GPU. `cpu`: host memory."""
    pin_memory: bool = True
    """Page-locked host memory, for faster transfers."""


class ZeroConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """ZeRO: what of the backbone is partitioned over the ranks. DeepSpeed's names."""

    stage: Literal[0, 1, 2, 3] = 1
    """0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    contiguous_gradients: bool = True
    """Copy gradients to one buffer as they are produced."""
    reduce_scatter: bool = True
    """Reduce each gradient to its owner instead of to all ranks."""
    reduce_bucket_size: int = Field(50_000_000, ge=1, le=2**63 - 1)
    """Elements reduced at once, and the size of the buffer for it."""
    use_multi_rank_bucket_allreduce: bool = True
    """One bucket may hold gradients of several owners."""
    allgather_partitions: bool = True
    """Collect updated parameters by all-gather instead of broadcasts."""
    allgather_bucket_size: int = Field(500_000_000, ge=1, le=2**63 - 1)
    """Elements gathered at once."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward; null: with stage 3."""
    round_robin_gradients: bool = False
    """Stage 1 and 2: spread the ownership of successive gradients over ranks."""
    sub_group_size: int = Field(1_000_000_000, ge=1, le=2**63 - 1)
    """Stage 3: elements updated at once."""
    stage3_prefetch_bucket_size: int = Field(50_000_000, ge=0, le=2**63 - 1)
    """Elements fetched ahead."""
    stage3_param_persistence_threshold: int = Field(100_000, ge=0, le=2**63 - 1)
    """Parameters with fewer elements are not partitioned."""
    stage3_max_live_parameters: int = Field(1_000_000_000, ge=0, le=2**63 - 1)
    """Elements that may be gathered at the same time."""
    stage3_max_reuse_distance: int = Field(1_000_000_000, ge=0, le=2**63 - 1)
    """Keep a parameter gathered if it is used again within so many elements."""
    stage3_model_persistence_threshold: int = Field(2**63 - 1, ge=0, le=2**63 - 1)
    """Elements of all parameters together that stay unpartitioned."""
    stage3_module_granularity_threshold: int = Field(0, ge=0, le=2**63 - 1)
    """Gather modules finer than this as a whole."""
    stage3_use_all_reduce_for_fetch_params: bool = False
    """Fetch by all-reduce."""
    stage3_allgather_sequential: bool = False
    """Fetch one parameter after the other."""
    memory_efficient_linear: bool = False
    """DeepSpeed's own linear layer, which replaces torch's in the whole process."""
    log_trace_cache_warnings: bool = False
    """Warn when the order of modules changes between steps."""
    offload_optimizer: OffloadOptimizerConfig = OffloadOptimizerConfig()
    """ZeRO-Offload of the optimizer."""

    @model_validator(mode="after")
    def _consistent(self) -> "ZeroConfig":
        if self.stage == 0 and self.offload_optimizer.device != "none":
            raise ValueError("offload_optimizer needs stage 1, 2 or 3")
        return self


class ExpertParallelConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Expert parallelism, under DeepSpeed's names. Everything else that DeepSpeed needs follows from the model."""

    enabled: bool = False
    """Let DeepSpeed replace the mixture-of-experts layers."""
    autoep_size: int = Field(1, ge=1, le=65_536)
    """Ranks that share one set of experts."""
    preset_model: Literal["deepseek_v3"] = "deepseek_v3"
    """The shape in which our model presents its experts."""
    use_grouped_mm: bool = True
    """Multiply all experts of a rank in one grouped matrix product."""
    disable_triton_grouped_mm: bool = False
    """Use torch's grouped product also where DeepSpeed prefers its Triton kernel."""
    gate_up_impl: Literal["separate", "fused"] = "separate"
    """Gate and up projection as two products or as one."""
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = "auto"
    """How the experts' outputs of a token are added."""
    async_split_plan: bool = False
    """GPU: hide the transfer of the token counts."""


class DeepSpeedConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """What a job tells DeepSpeed."""

    zero_optimization: ZeroConfig = ZeroConfig()
    """Partitioning of the backbone."""
    expert_parallel: ExpertParallelConfig = ExpertParallelConfig()
    """Spreading experts over ranks."""
    communication_data_type: Literal["fp32", "bf16"] = "fp32"
    """Number format of the gradients that are sent; bf16 halves the traffic and rounds the sums."""
    use_data_before_expert_parallelism: bool = False
    """Place the copies of an expert on neighbouring ranks, not the different experts."""
    wall_clock_breakdown: bool = False
    """Log DeepSpeed's own timings; needs log_level info."""
    memory_breakdown: bool = False
    """Log memory along a step; needs log_level info."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """What DeepSpeed prints."""
    disable_python_gc: bool = False
    """Stop Python's garbage collector while training."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, section: Any) -> Any:
        if isinstance(section, dict):
            for key, ours in OWNED_KEYS.items():
                if key in section:
                    raise ValueError(f"{key} is not set here: {ours} decides it")
            _refuse_unsupported(section, UNSUPPORTED_KEYS, "")
            _refuse_unsupported(section.get("zero_optimization"), UNSUPPORTED_ZERO_KEYS, "zero_optimization.")
            _refuse_unsupported(section.get("expert_parallel"), UNSUPPORTED_EXPERT_KEYS, "expert_parallel.")
        return section

    @model_validator(mode="after")
    def _consistent(self) -> "DeepSpeedConfig":
        if self.expert_parallel.autoep_size > 1 and not self.expert_parallel.enabled:
            raise ValueError("expert_parallel.autoep_size above 1 needs expert_parallel.enabled: true")
        return self

    def check(self, world_size: int, num_experts: int | None) -> None:
        """Raises UserError if the ranks or the model's experts cannot be divided as asked.

        Args:
            world_size: ranks of the job.
            num_experts: routed experts of a layer; None for a model without experts.
        """
        size = self.expert_parallel.autoep_size
        if not self.expert_parallel.enabled:
            return
        if num_experts is None:
            raise UserError("deepspeed.expert_parallel is enabled, but the model has no experts (model.moe)")
        for what, number in (("model.moe.num_experts", num_experts), ("the number of ranks", world_size)):
            if number % size:
                raise UserError(
                    f"deepspeed.expert_parallel.autoep_size {size} does not divide {what}, {number}: "
                    f"choose one of {', '.join(str(n) for n in range(1, number + 1) if number % n == 0)}"
                )

    def build(
        self, dtype: Literal["bf16", "fp32"], accumulation_steps: int, world_size: int, elements: int
    ) -> dict[str, Any]:
        """The whole config for `deepspeed.initialize`, for a model of so many elements.

        Batch sizes are in micro-batches (one "sample" each): DeepSpeed needs them for nothing but its own counters.
        """
        config = self.model_dump()
        zero = config["zero_optimization"]
        # DeepSpeed allocates a bucket whole, also where all gradients together fill a part of it.
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], elements)
        if zero["overlap_comm"] is None:
            zero["overlap_comm"] = zero["stage"] == 3
        if not self.expert_parallel.enabled:
            del config["expert_parallel"]
        # In stage 0 DeepSpeed cannot accumulate in a dtype other than the parameters'.
        accumulation_dtype = dtype if zero["stage"] == 0 else "fp32"
        return config | {
            "train_batch_size": accumulation_steps * world_size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation_steps,
            "managed_gradient_accumulation": True,
            "gradient_clipping": 0.0,
            "gradient_allreduce_op": "mean",
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "bf16": {"enabled": dtype == "bf16", "check_grad_overflow": False, "immediate_grad_update": False},
            "fp16": {"enabled": False},
            "data_types": {"grad_accum_dtype": accumulation_dtype, "keep_in_fp32_modules": "auto"},
            # On by default, and the host would wait for the device at each forward and each step.
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
            "zero_allow_untested_optimizer": False,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
            "dump_state": False,
        }


def _refuse_unsupported(section: Any, unsupported: frozenset[str], path: str) -> None:
    for key in section if isinstance(section, dict) else ():
        if key in unsupported:
            raise ValueError(f"{path}{key} is a DeepSpeed setting that is not supported")
