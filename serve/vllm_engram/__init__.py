"""vLLM's plugin for exports of type `engram`: language models with n-gram tables in host memory.

Every process of vLLM calls `register`, by the entry point `vllm.general_plugins`.

| file | what it has |
|---|---|
| `config.py` | the export's config, under the names that vLLM's DeepSeek layers read |
| `refusals.py`, `settings.py` | the settings of vLLM that are refused |
| `addresses.py`, `tables.py` | token ids to rows, and their values from the memory-mapped files |
| `pages.py`, `history.py` | what tokens look back to: in the cache of keys and values, beside these |
| `layers.py`, `model.py` | the network |
"""


def register() -> None:
    """Tells vLLM of the model, its config, and what is checked before it starts."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .config import ARCHITECTURE, EngramConfig
    from .settings import Settings

    AutoConfig.register(EngramConfig.model_type, EngramConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "vllm_engram.model:EngramForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Settings
