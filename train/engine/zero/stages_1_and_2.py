"""ZeRO 1 and 2: optimizer groups as flat tensors that are cut into parts for the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from torch import Tensor

from train.engine.zero.wrapper import FINITE, FlatGroup, Fragment, Wrapper


class Partitioned(Wrapper):
    """ZeRO 1 and 2: each optimizer group is one flat tensor, cut into equal parts for the ranks."""

    lists = ("bit16_groups", "single_partition_of_fp32_groups")

    def flat_groups(self) -> list[FlatGroup]:
        """One per optimizer group, read off the links between low and high precision that DeepSpeed makes."""
        parameters, flats = (getattr(self.optimizer, name) for name in self.lists)
        options = self.optimizer.optimizer.param_groups
        return [
            FlatGroup(flat, _linked(group_parameters), group["muon"], process_group)
            for group_parameters, flat, group, process_group in zip(
                parameters, flats, options, self.optimizer.real_dp_process_group, strict=True
            )
        ]

    def gradients(self) -> list[Sequence[Tensor]]:
        """The averaged partition; with CPU offload DeepSpeed has already moved it to the master weights' `.grad`."""
        if self.optimizer.cpu_offload:
            return [(flat.grad,) for flat in self.optimizer.single_partition_of_fp32_groups]
        return [self.optimizer.averaged_gradients[index] for index in range(len(self.optimizer.bit16_groups))]

    def publish(self) -> None:
        """DeepSpeed's own copy and all-gather."""
        self.optimizer.update_lp_params()

    def trust_gradients(self) -> None:
        """By DeepSpeed's own switches; with CPU offload, which waits for the device anyway, its step needs the norm."""
        self.optimizer.check_grad_overflow = False
        self.optimizer.compute_grad_norm = self.optimizer.cpu_offload


class PartitionedBf16(Partitioned):
    """ZeRO 1 in bf16: as `Partitioned`, with every rank accumulating all gradients in one fp32 buffer."""

    lists = ("bf16_groups", "fp32_groups_flat_partition")

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        # DeepSpeed's own adds parameter by parameter, with a copy in fp32 of each gradient: a tenth of the host's time.
        optimizer.update_hp_grads = self._add_gradients

    @torch.no_grad()
    def _add_gradients(self, clear_lp_grads: bool = False) -> None:
        """Adds a micro-batch's gradients to the fp32 buffer."""
        optimizer = self.optimizer
        totals, gradients = [], []
        for index, group in enumerate(optimizer.bf16_groups):
            for place, parameter in enumerate(group):
                if parameter.grad is not None:
                    parameter._hp_grad = optimizer.fp32_groups_gradients[index][place]
                    optimizer.fp32_groups_has_gradients[index][place] = True
                    totals.append(parameter._hp_grad)
                    gradients.append(parameter.grad.view_as(parameter._hp_grad))
        if totals:
            torch._foreach_add_(totals, gradients)
        if clear_lp_grads:
            torch._foreach_zero_(gradients)

    def gradients(self) -> list[Sequence[Tensor]]:
        """The part of the buffer that this rank's partition needs."""
        return [(gradient,) for gradient in self.optimizer.fp32_groups_gradient_flat_partition]

    def trust_gradients(self) -> None:
        """Replaces the functions of the norm, which are the module's and have no other use there."""
        bf16_optimizer.get_global_norm_of_tensors = lambda *_, **__: FINITE
        bf16_optimizer.get_norm_with_moe_layers = lambda *_, **__: FINITE


def _linked(parameters: Sequence[Any]) -> list[Fragment]:
    links = ((parameter, parameter._hp_mapping) for parameter in parameters)
    return [
        Fragment(p, link.lp_fragment_address.start, link.lp_fragment_address.numel, link.hp_fragment_address.start)
        for p, link in links
        if link is not None
    ]
