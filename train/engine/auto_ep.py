"""AutoEP, DeepSpeed's expert parallelism: the only file that knows its layer, its names and what it looks for.

It replaces every `model.moe.MoE` and spreads the experts over R ranks (`deepspeed/moe/ep_repack.py`; E experts, F
expert width, D hidden):

    ours, prefix model.layers.N.mlp.             AutoEP's, same prefix
    gate.weight                   [E, D]         router.gate.weight              [E, D]
    gate.e_score_correction_bias  [E] buffer     router.e_score_correction_bias  [E] buffer, fp32, saved
    experts.gate_up_proj          [E, 2F, D]     experts.w1 = gate_up_proj[:, :F]   [E/R, F, D]
                                                 experts.w3 = gate_up_proj[:, F:]   [E/R, F, D]
    experts.down_proj             [E, D, F]      experts.w2                         [E/R, D, F]
    shared_experts.*                             unchanged
    tokens_per_expert             [E] buffer     tokens_per_expert               [E] buffer, fp32, not saved

Rank r holds experts [r E/R, (r+1) E/R). AutoEP's layer counts tokens in evaluation too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.module_inject import auto_ep_layer
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.utils import logger
from torch import Tensor, nn

from model.router_logits import router_logits
from train.optim.flat_parts import Run

# AutoEP warns that the model's factor on the routed experts overrides an equal one.
logger.addFilter(lambda record: "overrides route_scale" not in record.getMessage())


class _Gate(nn.Linear):
    """The router's linear map, computed as ours; AutoEP's own multiplies in the dtype of the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return router_logits(tokens.flatten(0, -2), self.weight).unflatten(0, tokens.shape[:-1])


class _Router(TokenChoiceTopKRouter):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.gate.__class__ = _Gate  # its parameters stay those that were made for it


def _choice_bias(layer: AutoEPMoELayer) -> Tensor:
    return layer.router.e_score_correction_bias


def _scores(layer: AutoEPMoELayer, hidden_BTD: Tensor) -> Tensor:
    scores_BTE: Tensor = torch.sigmoid(layer.router.gate(hidden_BTD))
    return scores_BTE


auto_ep_layer.TokenChoiceTopKRouter = _Router
# What makes the layer a `model.balance.Balanced`.
AutoEPMoELayer.choice_bias = property(_choice_bias)
AutoEPMoELayer.scores = _scores

_STACKS = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
"""Logical stack of each of AutoEP's, and which half of an expert's matrix it is."""


class LogicalNames:
    """Translates names, shapes and positions from the module as it is to the model as it was written."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, AutoEPMoELayer)}

    def _split(self, name: str) -> tuple[AutoEPMoELayer | None, str, str]:
        """The AutoEP layer a parameter or buffer belongs to, the layer's name, and the rest of the name."""
        for prefix, layer in self._layers.items():
            if name.startswith(f"{prefix}."):
                return layer, prefix, name.removeprefix(f"{prefix}.")
        return None, "", name

    def name(self, name: str) -> str:
        """Logical name of a parameter or buffer."""
        layer, prefix, rest = self._split(name)
        if layer is None:
            return name
        if rest.startswith("router."):
            return f"{prefix}.gate.{rest.removeprefix('router.').removeprefix('gate.')}"
        if rest.startswith("experts.") and (leaf := rest.removeprefix("experts.")) in _STACKS:
            return f"{prefix}.experts.{_STACKS[leaf][0]}"
        return name

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Logical shape of the parameter called `name` in the module, where it has `shape`."""
        layer, _, rest = self._split(name)
        if layer is None or not rest.startswith("experts."):
            return shape
        rows = shape[1] if rest == "experts.w2" else 2 * shape[1]
        return (layer.num_experts, rows, shape[2])

    def runs(self, name: str, shape: tuple[int, ...], start: int, numel: int, offset: int) -> Iterator[Run]:
        """Says in logical terms what `numel` elements from `start` of the module's parameter `name` are."""
        layer, _, rest = self._split(name)
        logical_name, logical_shape = self.name(name), self.shape(name, shape)
        if layer is None or not rest.startswith("experts."):
            yield Run(logical_name, logical_shape, start, numel, offset)
            return
        local_size, logical_size = shape[1] * shape[2], logical_shape[1] * logical_shape[2]
        first_expert = layer.ep_rank * layer.num_local_experts
        half = _STACKS[rest.removeprefix("experts.")][1] * local_size
        end = start + numel
        while start < end:
            expert, within = divmod(start, local_size)
            length = min(end - start, local_size - within)
            logical_start = (first_expert + expert) * logical_size + half + within
            yield Run(logical_name, logical_shape, logical_start, length, offset)
            start, offset = start + length, offset + length
