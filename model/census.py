"""Where a model's parameters are, and which of them compute for one token.

The rows of the Engram tables are not parameters of the model, and are not counted here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.config import ModelConfig
from model.parameters import PARTS, Part, kind_of
from model.transformer import LanguageModel


class PartCount(NamedTuple):
    """Parameters of one part."""

    total: int = 0
    """All."""
    active: int = 0
    """Those that compute for one token: of the input embedding none, as a token reads one row of it (all if it is the
    output head too), of the routed experts those that the token visits, of every other part all."""
    multiplied: int = 0
    """The active ones that are in matrices: each is multiplied once per token."""


@dataclass(frozen=True)
class Census:
    """Parameters by part.

    Attributes:
        parts: a count for each of `PARTS`, in that order.
    """

    parts: dict[Part, PartCount]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.total for part in self.parts.values())

    @property
    def active(self) -> int:
        """Those that compute for one token, without the input embedding: "activated (w/o token embed)" in table 1 of
        the Engram paper (arXiv 2601.07372)."""
        return sum(part.active for part in self.parts.values())

    @property
    def multiplied(self) -> int:
        """Those in matrices that are multiplied for one token."""
        return sum(part.multiplied for part in self.parts.values())

    @property
    def idle_experts(self) -> int:
        """Those of the routed experts that a token does not visit."""
        experts = self.parts["routed_experts"]
        return experts.total - experts.active


def take_census(config: ModelConfig) -> Census:
    """Counts without allocating: the model is built on the meta device."""
    with torch.device("meta"):
        return count_model(LanguageModel(config))


def count_model(model: LanguageModel) -> Census:
    """Counts the parameters of a model that is neither sharded nor taken over by an engine.

    Raises:
        ValueError: a parameter is of no known kind.
    """
    parts = dict.fromkeys(PARTS, PartCount())
    for name, parameter in model.named_parameters():
        part = kind_of(name).part
        total = parameter.numel()
        active = _active(part, total, model.config)
        counted = PartCount(total, active, active if parameter.dim() > 1 else 0)
        parts[part] = PartCount(*map(sum, zip(parts[part], counted, strict=True)))
    return Census(parts)


def _active(part: Part, total: int, config: ModelConfig) -> int:
    if part == "input_embedding" and not config.tie_embeddings:
        return 0
    if part == "routed_experts" and config.moe:
        return total // config.moe.num_experts * config.moe.experts_per_token
    return total
