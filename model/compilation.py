"""torch.compile, block by block.

Blocks of one kind are alike, so each kind is compiled once, however many there are. What a wrapper of the model does
between blocks stays as it is. What depends on sizes known only from the data is left out of the graphs: attention
document by document and experts one by one (on a CPU, or in fp32), and a layer that replaces a mixture.
"""

from typing import Any, cast

import torch

from model.mlp import SwiGLU
from model.moe import MoE
from model.transformer import LanguageModel

_VARIANTS = 64
"""Times that a block's code may be compiled: kinds of blocks, with and without gradients, shapes of batches."""


def compile_blocks(model: LanguageModel, *, backend: str = "inductor") -> None:
    """Compiles the blocks of `model` in place, when each first runs; parameters keep their names.

    To be called once an engine has taken over the model, as it may replace modules. With ZeRO 3 its hooks must be
    around blocks: inside, they would be traced, and retraced for every state that they are in.

    Args:
        model: ours, or the same with layers that were replaced.
        backend: torch.compile's; `aot_eager` traces everything and needs no C++ compiler.
    """
    import torch._dynamo.config as dynamo  # imports the compiler

    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * _VARIANTS)
    for block in cast("list[Any]", model.model.layers):
        if not isinstance(block.mlp, MoE | SwiGLU):
            block.mlp.forward = torch.compiler.disable(block.mlp.forward)
        # Not the call, to which hooks belong.
        block.forward = torch.compile(block.forward, backend=backend)
