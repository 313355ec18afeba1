"""Where each of DeepSpeed's optimizer wrappers keeps weights and gradients. All that depends on its insides is here.

DeepSpeed 0.19.8 picks the wrapper by ZeRO stage and dtypes (`runtime/engine.py`, `_do_optimizer_sanity_check`):

    stage  fp32                     bf16                     gradients are accumulated
    0      none                     FP16_UnfusedOptimizer    in the parameters' dtype, in `parameter.grad`
    1      DeepSpeedZeroOptimizer   BF16_Optimizer           in fp32, in `parameter.grad` or a flat buffer
    2      DeepSpeedZeroOptimizer   DeepSpeedZeroOptimizer   in fp32, in the owned partition
    3      ..._Stage3               ..._Stage3               in fp32, in the owned partition

In all of them the raw averaged gradients lie still between the last backward and the step, because our base optimizer
is none that DeepSpeed knows: with its own Muon, orthogonalisation already happens while gradients are reduced.

All but the first compute a norm of their own in `step` and read it, so that the host waits for the device once more, or
twice. The engine knows the norm by then, and whether it is finite: `Wrapper.trust_gradients` takes theirs out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16 import unfused_optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from train.optim.backbone import BackboneOptimizer

_FINITE = 0.0
"""A norm on the host that passes DeepSpeed's checks: whether the step is taken was decided before."""


class Fragment(NamedTuple):
    """Consecutive elements of a parameter of the module, and where they stand in a flat tensor."""

    parameter: nn.Parameter
    start: int
    numel: int
    offset: int


class FlatGroup(NamedTuple):
    """One tensor that the base optimizer updates."""

    flat: Tensor
    fragments: list[Fragment]
    muon: bool
    group: dist.ProcessGroup


class Wrapper(ABC):
    """Uniform access to one of DeepSpeed's wrappers."""

    replicated = False
    """Every rank holds whole parameters, not partitions."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @abstractmethod
    def flat_groups(self) -> list[FlatGroup]:
        """The fp32 master weights, in an order that is the same on all ranks."""

    @abstractmethod
    def gradients(self) -> list[Sequence[Tensor]]:
        """For every flat group the raw averaged gradients, in any dtype and shapes, after the last backward."""

    @abstractmethod
    def publish(self) -> None:
        """Makes changed master weights the weights of the forward. Collective."""

    @abstractmethod
    def trust_gradients(self) -> None:
        """Has the wrapper's `step` neither compute the gradients' norm nor look whether they are finite."""


class Plain(Wrapper):
    """ZeRO 0 in fp32: the base optimizer works on the model's parameters."""

    replicated = True

    def _parameters(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        return [(parameter, group) for group in self.optimizer.param_groups for parameter in group["params"]]

    def flat_groups(self) -> list[FlatGroup]:
        """One a parameter."""
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
        """One a parameter."""
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
        """Both checks; the norm's functions are the module's, which has no other use for them."""
        self.optimizer.overflow_checker.check = lambda *_: False
        unfused_optimizer.get_weight_norm = lambda *_, **__: _FINITE
        unfused_optimizer.get_global_norm = lambda **_: _FINITE


class Partitioned(Wrapper):
    """ZeRO 1 and 2: each optimizer group is one flat tensor, cut into equal parts for the ranks."""

    lists = ("bit16_groups", "single_partition_of_fp32_groups")

    def flat_groups(self) -> list[FlatGroup]:
        """One an optimizer group, read off the links between low and high precision that DeepSpeed makes."""
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
        """DeepSpeed's own switches; with CPU offload, which waits for the device anyway, its step needs the norm."""
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
        """The functions of the norm are the module's, which has no other use for them."""
        bf16_optimizer.get_global_norm_of_tensors = lambda *_, **__: _FINITE
        bf16_optimizer.get_norm_with_moe_layers = lambda *_, **__: _FINITE


class FullyPartitioned(Wrapper):
    """ZeRO 3: every parameter is cut into equal parts for the ranks; parts are flattened by sub-group."""

    def flat_groups(self) -> list[FlatGroup]:
        """One a sub-group."""
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
        """The groups' norms, and the look at them; single gradients it checks for fp16 alone."""
        self.optimizer._get_norm_groups = lambda: [_FINITE]
        stage3.is_invalid_grad_norm = lambda _: False


_WRAPPERS: dict[type, type[Wrapper]] = {
    BackboneOptimizer: Plain,
    FP16_UnfusedOptimizer: Unfused,
    DeepSpeedZeroOptimizer: Partitioned,
    BF16_Optimizer: PartitionedBf16,
    DeepSpeedZeroOptimizer_Stage3: FullyPartitioned,
}


def wrap(optimizer: Any) -> Wrapper:
    """The access to whatever `deepspeed.initialize` returned as optimizer; RuntimeError for an unknown one."""
    if type(optimizer) not in _WRAPPERS:
        raise RuntimeError(f"DeepSpeed wrapped the optimizer in a {type(optimizer).__name__}, which is not known here")
    return _WRAPPERS[type(optimizer)](optimizer)


def expert_group(parameter: nn.Parameter) -> str | None:
    """DeepSpeed's name for the ranks that experts are spread over, if the parameter belongs to such experts."""
    return None if getattr(parameter, "allreduce", True) else parameter.group_name  # type: ignore[attr-defined]


def sharing_group(parameter: Any) -> dist.ProcessGroup:
    """The ranks that hold the same parameter: all, or those with the same experts."""
    if name := expert_group(parameter):
        return groups._get_expert_data_parallel_group(name)
    return groups._get_sequence_data_parallel_group()


def _linked(parameters: Sequence[Any]) -> list[Fragment]:
    links = ((parameter, parameter._hp_mapping) for parameter in parameters)
    return [
        Fragment(p, link.lp_fragment_address.start, link.lp_fragment_address.numel, link.hp_fragment_address.start)
        for p, link in links
        if link is not None
    ]


def _even_parts(parameters: Sequence[Any], rank: int) -> list[Fragment]:
    fragments, offset = [], 0
    for parameter in parameters:
        start = rank * parameter.partition_numel()
        numel = min(parameter.partition_numel(), parameter.ds_numel - start)
        if numel > 0:
            fragments.append(Fragment(parameter, start, numel, offset))
        offset += parameter.partition_numel()
    return fragments


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter of the module, also while ZeRO 3 has it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
