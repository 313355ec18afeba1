"""ZeRO 3: every parameter cut into parts for the ranks."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.zero import stage3
from torch import Tensor

from train.engine.zero.wrapper import FINITE, FlatGroup, Fragment, Wrapper


class FullyPartitioned(Wrapper):
    """ZeRO 3: every parameter is cut into equal parts for the ranks; parts are flattened by sub-group."""

    def flat_groups(self) -> list[FlatGroup]:
        """One per sub-group."""
        optimizer, result = self.optimizer, []
        for index, (parameters, flat) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            process_group = optimizer.sub_group_process_groups[index]
            options = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[index]]
            fragments = _even_parts(parameters, dist.get_rank(process_group))
            result.append(FlatGroup(flat, fragments, options["muon"], process_group))
        return result

    def gradients(self) -> list[Sequence[Tensor]]:
        """The averaged parts; with CPU offload they are already in the master weights' `.grad`."""
        optimizer = self.optimizer
        if optimizer.offload_optimizer:
            return [(flat.grad,) for flat in optimizer.fp32_partitioned_groups_flat]
        return [optimizer.averaged_gradients[index] for index in range(len(optimizer.fp16_groups))]

    def publish(self) -> None:
        """What the wrapper's own step does after the update, sub-group by sub-group."""
        self.optimizer._partition_all_parameters()
        for index in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)

    def trust_gradients(self) -> None:
        """Replaces the groups' norms and their check; single gradients are checked for fp16 alone."""
        self.optimizer._get_norm_groups = lambda: [FINITE]
        stage3.is_invalid_grad_norm = lambda _: False


def _even_parts(parameters: Sequence[Any], rank: int) -> list[Fragment]:
    fragments, offset = [], 0
    for parameter in parameters:
        start = rank * parameter.partition_numel()
        numel = min(parameter.partition_numel(), parameter.ds_numel - start)
        if numel > 0:
            fragments.append(Fragment(parameter, start, numel, offset))
        offset += parameter.partition_numel()
    return fragments
