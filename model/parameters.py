"""What kind of parameter a name stands for."""

from typing import Literal

import torch

Kind = Literal["embedding", "head", "router", "expert", "mapping", "vector", "matrix"]


def parameter_kind(name: str, shape: torch.Size | tuple[int, ...]) -> Kind:
    """Classifies a parameter by its name, before or after AutoEP's takeover, and its unsharded shape.

    `expert` stands for stacks of matrices [experts, rows, columns], `mapping` for the small projections of hyper-
    connections, `vector` for everything one-dimensional (norms, convolutions), `matrix` for every other projection:
    those that Muon is for.
    """
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    if ".mlp.gate." in name or ".mlp.router." in name:
        return "router"
    if ".mlp.experts." in name:
        return "expert"
    if "hyper_connection" in name and len(shape) > 1:
        return "mapping"
    return "vector" if len(shape) == 1 else "matrix"
