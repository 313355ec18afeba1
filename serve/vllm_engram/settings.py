"""What of vLLM this model does not do; told before it starts, in one line each."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform


class Settings(VerifyAndUpdateConfig):
    """Looks at the settings of a server or an `LLM`."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError for the first setting that would give wrong tokens, or was never tried."""
        for wrong, line in _refusals(vllm_config):
            if wrong:
                raise ValueError(f"vllm-engram: {line}")


def _refusals(told: Any) -> list[tuple[bool, str]]:
    parallel = told.parallel_config
    return [
        (
            told.model_config.enable_prompt_embeds,
            "--enable-prompt-embeds: n-grams are made of token ids, which embeddings do not tell; leave it out",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism would part a request from the tokens that it looks back to; set both to 1",
        ),
        (
            told.kv_transfer_config is not None or told.cache_config.kv_offloading_size is not None,
            "--kv-transfer-config and --kv-offloading-size may leave behind what tokens look back to; leave them out",
        ),
        (
            not current_platform.is_cpu() and not told.model_config.enforce_eager,
            "rows come from host memory in the middle of a step, which no CUDA graph records; add --enforce-eager",
        ),
    ]
