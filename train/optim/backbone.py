"""AdamW and Muon over flat parts, as the engine's base optimizer.

Whatever wraps it (plain data parallelism, any ZeRO stage), the wrapper hands it raw averaged gradients in fp32 right
before the step. That makes it the one place to apply the clip and to drop a step, the same for every ZeRO stage.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.optim.flat_parts import FlatPart, Layout
from train.optim.muon import Orthogonalizer
from train.optim.optimizer import GroupKey, OptimizerConfig

ADAM_STATES = ("exp_avg", "exp_avg_sq")
MUON_STATES = ("momentum_buffer",)


class BackboneOptimizer(torch.optim.AdamW):
    """Muon for the groups marked `muon`, AdamW for the others; decoupled weight decay in both.

    `step` updates within `updating` alone: wrappers call it while they are built too, and for steps that are skipped.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> None:
        """
        Args:
            groups: from `group_options`, with `params`.
            config: hyperparameters.
        """
        super().__init__(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self._gradient_scale: float | None = None  # within `updating`
        self._config = config
        self._orthogonalizers: dict[Tensor, Orthogonalizer] = {}
        self._newton_schulz_dtype = torch.float32

    def bind(self, parts: Sequence[FlatPart], muon: Sequence[bool], layout: Layout, device: torch.device) -> None:
        """Makes the state of every part, all zero, and the plan of Muon's exchanges.

        Args:
            parts: this rank's, in the order of `layout`; their flat tensors are what `step` will see.
            muon: whether Muon updates the part.
            layout: from `gather_layout`.
            device: where Muon orthogonalises.
        """
        on_gpu = self._config.newton_schulz_dtype == "auto" and device.type != "cpu"
        if on_gpu or self._config.newton_schulz_dtype == "bf16":
            self._newton_schulz_dtype = torch.bfloat16
        for index, (part, is_muon) in enumerate(zip(parts, muon, strict=True)):
            names = MUON_STATES if is_muon else ADAM_STATES
            self.state[part.flat] = {name: torch.zeros_like(part.flat) for name in names}
            if is_muon:
                runs = [layout[rank][index] for rank in dist.get_process_group_ranks(part.group)]
                self._orthogonalizers[part.flat] = Orthogonalizer(runs, part.group, device)
            else:
                self.state[part.flat]["step"] = torch.zeros((), dtype=torch.float32, device=part.flat.device)

    def set_lr_factor(self, factor: float) -> None:
        """Sets every group's learning rate to its peak times `factor`."""
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def set_step_count(self, steps: int) -> None:
        """Sets how many steps Adam's bias correction counts as taken."""
        for state in self.state.values():
            if "step" in state:
                state["step"].fill_(steps)

    @contextmanager
    def updating(self, gradient_scale: float) -> Iterator[None]:
        """Within, `step` updates, with gradients multiplied by `gradient_scale`."""
        self._gradient_scale = gradient_scale
        try:
            yield
        finally:
            self._gradient_scale = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates the parameters that are in the groups now, from their `.grad`, which is scaled in place."""
        if self._gradient_scale is None:
            return
        groups = self.param_groups
        for parameter in (parameter for group in groups for parameter in group["params"]):
            if self._gradient_scale != 1.0 and parameter.grad is not None:
                parameter.grad.mul_(self._gradient_scale)
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                self._muon_step(parameter, group["lr"], group["weight_decay"])

    def _muon_step(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        momentum = self.state[parameter]["momentum_buffer"]
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        momentum.lerp_(gradient, 1 - self._config.momentum)
        update = gradient.lerp(momentum, self._config.momentum)
        self._orthogonalizers[parameter](
            update, self._config.newton_schulz_steps, self._newton_schulz_dtype, self._config.muon_update_rms
        )
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)


def group_options(config: OptimizerConfig, key: GroupKey) -> dict[str, Any]:
    """Options of the optimizer group of the parameters with this key."""
    lr = config.muon_learning_rate if key.muon and config.muon_learning_rate else config.learning_rate
    weight_decay = config.weight_decay if key.decay else 0.0
    return {"muon": key.muon, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}
