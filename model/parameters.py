"""How many parameters a model has, and of what kind."""

from typing import Literal, NamedTuple

import torch
from torch import nn

from model.config import ModelConfig
from model.transformer import LanguageModel

Kind = Literal["embedding", "head", "router", "expert", "vector", "matrix"]


class ParameterCounts(NamedTuple):
    """Parameters of the backbone; the rows of the Engram tables are no part of it."""

    total: int
    """All."""
    active: int
    """Those that compute for one token: all but the input embedding, of which a token reads one row, and the routed
    experts that it does not visit. The convention of the Engram paper's "3.8B active"."""
    experts: int
    """Routed experts."""
    embedding: int
    """Input embedding."""
    head: int
    """Output head; 0 where it is the input embedding."""
    engram: int
    """Projections, norms and convolutions of the Engram modules."""


def parameter_kind(name: str, shape: torch.Size | tuple[int, ...]) -> Kind:
    """Classifies a parameter by its name, before or after AutoEP's takeover, and its unsharded shape.

    `expert` stands for stacks of matrices [experts, rows, columns], `vector` for everything one-dimensional (norms,
    convolutions), `matrix` for every other projection: those that Muon is for.
    """
    if "embed_tokens" in name:
        return "embedding"
    if "lm_head" in name:
        return "head"
    if ".mlp.gate." in name or ".mlp.router." in name:
        return "router"
    if ".mlp.experts." in name:
        return "expert"
    return "vector" if len(shape) == 1 else "matrix"


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Counts without allocating: the model is built on the meta device."""
    with torch.device("meta"):
        return count_model_parameters(LanguageModel(config), config)


def count_model_parameters(model: nn.Module, config: ModelConfig) -> ParameterCounts:
    """Counts those of a model that is not sharded."""
    sizes = {"embedding": 0, "head": 0, "router": 0, "expert": 0, "vector": 0, "matrix": 0}
    engram = 0
    for name, parameter in model.named_parameters():
        sizes[parameter_kind(name, parameter.shape)] += parameter.numel()
        engram += parameter.numel() if ".engram." in name else 0
    total, experts = sum(sizes.values()), sizes["expert"]
    idle = (
        experts // config.moe.num_experts * (config.moe.num_experts - config.moe.experts_per_token) if config.moe else 0
    )
    # A tied embedding works as the head, so it does compute.
    lookup = 0 if config.tie_embeddings else sizes["embedding"]
    return ParameterCounts(
        total=total,
        active=total - idle - lookup,
        experts=experts,
        embedding=sizes["embedding"],
        head=sizes["head"],
        engram=engram,
    )
