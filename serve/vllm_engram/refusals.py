"""What of vLLM this model does not do; told before it starts, in one line each. Loads nothing of vLLM's."""

from typing import Any


def first_refusal(told: Any, on_cpu: bool) -> str | None:
    """What to tell of the first setting that would give wrong tokens, or was never tried; None if all will do.

    Args:
        told: a `VllmConfig`.
        on_cpu: whether vLLM computes on a CPU.
    """
    return next((line for wrong, line in _refusals(told, on_cpu) if wrong), None)


def _refusals(told: Any, on_cpu: bool) -> list[tuple[bool, str]]:
    parallel, model = told.parallel_config, told.model_config
    return [
        (
            model.enable_prompt_embeds,
            "--enable-prompt-embeds: n-grams are made of token ids, which embeddings do not tell; leave it out",
        ),
        (
            str(model.dtype) == "torch.float16",
            "--dtype float16: training has no such range of numbers, and it was never tried; set float32 or bfloat16",
        ),
        (
            model.quantization is not None,
            "--quantization was never tried with tables and their projections; leave it out",
        ),
        (
            told.cache_config.cache_dtype != "auto",
            "--kv-cache-dtype was never tried: what tokens look back to is kept as it is; leave it out",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism would part a request from the tokens that it looks back to; set both to 1",
        ),
        (
            parallel.tensor_parallel_size > 1 or parallel.data_parallel_size > 1 or parallel.enable_expert_parallel,
            "--tensor-parallel-size, --data-parallel-size and --enable-expert-parallel were never tried; leave them "
            "out, and start a server for each copy of the model",
        ),
        (
            told.kv_transfer_config is not None or told.cache_config.kv_offloading_size is not None,
            "--kv-transfer-config and --kv-offloading-size may leave behind what tokens look back to; leave them out",
        ),
        (
            not on_cpu and not model.enforce_eager,
            "rows come from host memory in the middle of a step, which no CUDA graph records; add --enforce-eager",
        ),
    ]
