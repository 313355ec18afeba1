"""How many operations a micro-batch gives a GPU, forward and backward, by what the model is made of.

Counted with tests/model/launches.py, part by part (CPU, torch 2.13); tests/launch/plan counts again and compares the
sum.
"""

from math import ceil

from model.config import ModelConfig

_ENDS, _LOSS_CHUNK = 93, 24
_DENSE, _EXPERTS, _SHARED, _QUERY_LATENT = 173, 222, 20, 30
_BRANCHES_ENDS, _BRANCHES = 3, 48
_ENGRAM, _KEY_PROJECTION, _CONVOLUTION, _TAP = 22, 5, 25, 15
_CPU_CHUNK, _GPU_CHUNK, _LEAST_TOKENS = 2**21, 2**27, 128  # of model/loss.py


def launch_count(model: ModelConfig, tokens: int) -> int:
    """Operations of a micro-batch of `tokens` tokens."""
    sparse = model.num_layers - model.dense_layers if model.moe else 0
    layers = _DENSE * (model.num_layers - sparse) + _EXPERTS * sparse
    if model.moe and model.moe.shared_experts:
        layers += _SHARED * sparse
    if model.attention.q_lora_rank is not None:
        layers += _QUERY_LATENT * model.num_layers
    if model.branches > 1:
        layers += _BRANCHES_ENDS + _BRANCHES * model.num_layers
    return _ENDS + _LOSS_CHUNK * loss_chunks(model, tokens) + layers + _engram(model)


def loss_chunks(model: ModelConfig, tokens: int) -> int:
    """Parts of a micro-batch whose logits are in memory one after another."""
    return ceil(tokens / loss_chunk(model))


def loss_chunk(model: ModelConfig, *, on_cpu: bool = False) -> int:
    """Tokens of such a part."""
    return max(_LEAST_TOKENS, (_CPU_CHUNK if on_cpu else _GPU_CHUNK) // model.vocab_size)


def _engram(model: ModelConfig) -> int:
    engram = model.engram
    if engram is None:
        return 0
    each = _ENGRAM + _KEY_PROJECTION * model.branches
    if engram.convolution:
        each += _CONVOLUTION + _TAP * engram.kernel_size
    return each * len(engram.layers)
