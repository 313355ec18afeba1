"""Every key that DeepSpeed 0.19.8 reads from its config and that a job's `deepspeed` section may not have.

A contract test checks that these and the keys of the section are all there are.
"""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OWNED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "train.micro_batch_size",
    "gradient_clipping": "train.gradient_clipping",
    "steps_per_print": "train.log_every",
    "bf16": "train.dtype",
    "bfloat16": "train.dtype",
    "fp16": "train.dtype",
    "torch_autocast": "train.dtype",
    "data_types": "train.dtype",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "scheduler": "schedule",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
    "wandb": "wandb",
    "tensorboard": "wandb",
    "csv_monitor": "wandb",
    "comet": "wandb",
    "data_efficiency": "data",
    "dataloader_drop_last": "data",
    "vocabulary_size": "model.vocab_size",
}
"""DeepSpeed's top-level keys for what a section of ours decides, and which."""

UNSUPPORTED_KEYS = _words(
    """
    activation_checkpointing aio amp autotuning comms_logger compile compression_training curriculum_learning
    disable_allgather dump_state eigenvalue elasticity flops_profiler gradient_allreduce_op
    gradient_predivide_factor graph_harvesting hybrid_engine nebula pipeline prescale_gradients
    progressive_layer_drop quantize_training seq_parallel_communication_data_type sparse_attention
    sparse_gradients tensor_parallel timers weight_quantization
    """
)
"""Top-level keys that DeepSpeed knows, or knew, and that are not supported here."""

UNSUPPORTED_ZERO_KEYS = _words(
    """
    compute_grad_norm cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint
    enable_sanity_checks ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights offload_param
    override_module_apply parameter_alignment pipeline_loading_checkpoint save_muon_momentum_buffer_in_memory
    stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save zenflow
    zero_hpz_partition_size zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights
    """
)
"""The same for `zero_optimization`."""

UNSUPPORTED_EXPERT_KEYS = _words(
    """
    comm_backend comm_max_tokens_per_rank comm_num_sm comm_qp_margin expert_activation expert_pattern
    expert_tensor_parallel_size expert_w1 expert_w2 expert_w3 has_shared_experts load_balance_coeff
    moe_layer_pattern num_expert_groups num_experts_attr num_limited_groups route_norm route_scale
    routed_scaling_factor router_pattern row_weighting_impl score_apply score_func shared_experts_gate_pattern
    shared_experts_pattern top_k top_k_attr validate_folding_routing
    """
)
"""The same for `expert_parallel`; most of it follows from the model."""
