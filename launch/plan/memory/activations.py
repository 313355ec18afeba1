"""Bytes per token that a micro-batch's forward keeps for its backward, by what the model is made of.

b is the bytes of a number (2 in bf16, 4 in fp32), D the hidden width, M branches of the stream. Kept are the inputs of
products, norms and gates:

    attention   D + 2 r_q + H (d_qk + d_nope + 2 d_v + d_qk) + 2 r_kv + d_rope numbers of b, and 4 H
                (normed input; both sides of the latents' norms; queries, keys, values with what they were split from,
                 the mixed values)
    SwiGLU      D + 4 F numbers of b (input, gate, up, SiLU of the gate, the product)
    experts     K (2 D + 4 F_e) b + D b, 4 (E + 2 K), and 8 x 4 K for the order; of shared experts a SwiGLU's 4 F b
    two norms   2 D b
    branches    (M + 2) D b + 4 (7 M^2 + 16 M + 3), model/hyper_connections.py
    Engram      (E_m + M D + D + M D) b + 12 M, and of the convolution M D (2 b + 4 (k + 1))
    ends        a norm, 2 D b of the stream and its gradient, and the gradients of the head, 4 V D (not per token)

E_m is the memory's width, k the taps. A norm on a GPU keeps its input; on a CPU two fp32 numbers instead.
With `train.recompute` only the stream before each block is kept, and one block's worth beside it.
"""

from dataclasses import dataclass

from launch.plan.launches import loss_chunk
from model.config import ModelConfig

_FLOAT = 4


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one rank, in bytes.

    Attributes:
        kept: for the backward, with every block's.
        kept_with_recompute: with the stream between blocks, and the largest block's.
        loss: logits of a chunk and the head's gradient, while the loss is computed.
        backward: gradients on their way through the largest block.
    """

    kept: float
    kept_with_recompute: float
    loss: float
    backward: float

    def peak(self, recompute: bool) -> float:
        """The most at one time: what is kept, and the larger of the two passing needs."""
        return (self.kept_with_recompute if recompute else self.kept) + max(self.loss, self.backward)


def activations(model: ModelConfig, tokens: int, width: int, *, on_cpu: bool = False) -> Activations:
    """Counts for a micro-batch of `tokens` tokens in numbers of `width` bytes."""
    blocks = [block_bytes(model, layer, width, on_cpu=on_cpu) for layer in range(model.num_layers)]
    stream = model.branches * model.hidden_size * width
    ends = model.hidden_size * (_norm_bytes(width, on_cpu) + 2 * width)
    chunk = min(tokens, loss_chunk(model, on_cpu=on_cpu))
    head = model.vocab_size * model.hidden_size
    # Logits as they are computed, in fp32, and their gradient; the head's gradient in fp32, and a chunk's part of it.
    # In fp32 the first three are one tensor, and the parts are added where they are computed.
    copies = 2 * width if width < _FLOAT else 0
    loss = chunk * model.vocab_size * (copies + _FLOAT) + head * (_FLOAT + copies / 2)
    return Activations(
        tokens * (sum(blocks) + ends),
        tokens * (stream * model.num_layers + max(blocks) + ends),
        loss,
        tokens * max(blocks) / 2,
    )


def block_bytes(model: ModelConfig, layer: int, width: int, *, on_cpu: bool = False) -> float:
    """Kept by block `layer`, per token."""
    norm = _norm_bytes(width, on_cpu)
    total = _attention(model, width, norm, on_cpu) + 2 * (model.hidden_size * norm + 4)
    total += (
        _experts(model, width)
        if model.has_experts(layer)
        else _swiglu(model.hidden_size, model.dense_hidden_size, width)
    )
    if model.branches > 1:
        branches = model.branches
        # The docstring's count has the sublayers' inputs, which the norms keep, on a GPU for themselves.
        total += (branches + 2) * model.hidden_size * width + 4 * (7 * branches**2 + 16 * branches + 3)
    if model.engram is not None and layer in model.engram.layers:
        total += _engram(model, width, norm)
    return total


def _norm_bytes(width: int, on_cpu: bool) -> int:
    return width if not on_cpu else 8


def _attention(model: ModelConfig, width: int, norm: int, on_cpu: bool) -> float:
    config = model.attention
    query, heads = config.qk_nope_dim + config.qk_rope_dim, config.heads
    latents = config.kv_lora_rank * (norm + width)
    if config.q_lora_rank is not None:
        latents += config.q_lora_rank * (norm + width)
    if on_cpu:  # values are padded to the queries' columns, and the result is cut again
        columns = max(query, config.v_dim)
        mixed = heads * (4 * columns + (config.v_dim if columns > config.v_dim else 0)) * width
    else:
        latents += config.qk_rope_dim * width
        mixed = heads * (2 * query + config.qk_nope_dim + 2 * config.v_dim) * width
    return model.hidden_size * width + latents + mixed + 4 * heads


def _swiglu(hidden: int, inner: int, width: int) -> float:
    return (hidden + 4 * inner) * width


def _experts(model: ModelConfig, width: int) -> float:
    moe, hidden = model.moe, model.hidden_size
    assert moe is not None
    chosen = moe.experts_per_token
    routed = chosen * (2 * hidden + 4 * moe.expert_hidden_size) * width
    router = 4 * (moe.num_experts + 2 * chosen) + 8 * 4 * chosen
    shared = 4 * moe.shared_experts * moe.expert_hidden_size * width
    return hidden * width + routed + router + shared


def _engram(model: ModelConfig, width: int, norm: int) -> float:
    engram, branches, hidden = model.engram, model.branches, model.hidden_size
    assert engram is not None
    keys = branches * hidden
    stream = keys if branches == 1 else 0  # with branches, the mappings keep it already
    total: float = (engram.memory_width + keys + hidden + stream) * width + 12 * branches
    if branches > 1:
        total += keys * width  # the stream after the sum, beside that before it
    if engram.convolution:
        total += keys * (norm + width + 4 * (engram.kernel_size + 1))
    return total
