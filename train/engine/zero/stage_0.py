"""ZeRO 0: every rank holds whole parameters."""

from collections.abc import Sequence
from typing import Any

from deepspeed.runtime.fp16 import unfused_optimizer
from torch import Tensor, nn

from train.engine.zero.wrapper import FINITE, FlatGroup, Fragment, Wrapper, sharing_group


class Plain(Wrapper):
    """ZeRO 0 in fp32: the base optimizer works on the model's parameters."""

    replicated = True

    def _parameters(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [(parameter, group) for group in self.optimizer.param_groups for parameter in group["params"]]

    def flat_groups(self) -> list[FlatGroup]:
        """One per parameter."""
        return [
            FlatGroup(p, [Fragment(p, 0, p.numel(), 0)], group["muon"], sharing_group(p))
            for p, group in self._parameters()
        ]

    def gradients(self) -> list[Sequence[Tensor]]:
        """`parameter.grad`."""
        return [() if p.grad is None else (p.grad,) for p, _ in self._parameters()]

    def publish(self) -> None:
        """Nothing: master weights and weights are the same."""

    def trust_gradients(self) -> None:
        """Nothing: there is no wrapper."""


class Unfused(Wrapper):
    """ZeRO 0 in bf16: an fp32 copy of each parameter."""

    replicated = True

    def _pairs(self) -> list[tuple[nn.Parameter, Tensor, dict[str, Any]]]:
        grouped = zip(
            self.optimizer.fp16_groups, self.optimizer.fp32_groups, self.optimizer.optimizer.param_groups, strict=True
        )
        return [(low, high, group) for lows, highs, group in grouped for low, high in zip(lows, highs, strict=True)]

    def flat_groups(self) -> list[FlatGroup]:
        """One per parameter."""
        return [
            FlatGroup(high, [Fragment(low, 0, low.numel(), 0)], group["muon"], sharing_group(low))
            for low, high, group in self._pairs()
        ]

    def gradients(self) -> list[Sequence[Tensor]]:
        """`parameter.grad` in bf16."""
        return [() if low.grad is None else (low.grad,) for low, _, _ in self._pairs()]

    def publish(self) -> None:
        """Copies, as the wrapper's own step does."""
        for low, high, _ in self._pairs():
            low.data.copy_(high.data)

    def trust_gradients(self) -> None:
        """Replaces both checks; the norm's functions are the module's, which has no other use for them."""
        self.optimizer.overflow_checker.check = lambda *_: False
        unfused_optimizer.get_weight_norm = lambda *_, **__: FINITE
        unfused_optimizer.get_global_norm = lambda **_: FINITE
