"""What the engine needs of DeepSpeed's optimizer wrappers, and what DeepSpeed notes on parameters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

FINITE = 0.0
"""A norm on the host that passes DeepSpeed's checks: whether the step is taken was decided before."""


class Fragment(NamedTuple):
    """Consecutive elements of a parameter of the module, and where they are in a flat tensor."""

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
        """Makes the wrapper's `step` neither compute the gradients' norm nor check whether they are finite."""


def expert_group(parameter: nn.Parameter) -> str | None:
    """DeepSpeed's name for the ranks that experts are spread over, if the parameter belongs to such experts."""
    return None if getattr(parameter, "allreduce", True) else parameter.group_name  # type: ignore[attr-defined]


def sharing_group(parameter: Any) -> dist.ProcessGroup:
    """The ranks that hold the same parameter: all, or those with the same experts."""
    if name := expert_group(parameter):
        return groups._get_expert_data_parallel_group(name)
    return groups._get_sequence_data_parallel_group()


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter of the module, also while ZeRO 3 has it partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
