"""Has vLLM look at its settings before it starts."""

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .refusals import first_refusal


class Settings(VerifyAndUpdateConfig):
    """Looks at the settings of a server or an `LLM`."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError for the first setting that is refused."""
        if line := first_refusal(vllm_config, current_platform.is_cpu()):
            raise ValueError(f"vllm-engram: {line}")
