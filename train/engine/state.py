"""Saving and loading a backbone as one logical image: whole tensors by parameter name."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from train.optim.backbone import ADAM_STATES, MUON_STATES, BackboneOptimizer
from train.optim.shards import Layout, Shard, gather_parameters, load_run

WEIGHT = "weight"
SLOTS = (WEIGHT, *ADAM_STATES, *MUON_STATES)


@dataclass
class EngineState:
    """All that a backbone needs to continue, by logical parameter name, whatever the ranks and the ZeRO stage."""

    steps: int
    """Optimizer steps taken."""
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """For each parameter `weight` (fp32 master) and its optimizer's tensors: `exp_avg` and `exp_avg_sq` (Adam), or
    `momentum_buffer` (Muon). CPU, logical shape."""
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Persistent buffers of the model. CPU."""


class LogicalState:
    """Puts the image together from all ranks' shards, and takes every rank's part from it."""

    def __init__(
        self,
        shards: Sequence[Shard],
        owned: Layout,
        optimizer: BackboneOptimizer,
        buffers: Callable[[], Mapping[str, Tensor]],
        device: torch.device,
    ) -> None:
        """
        Args:
            shards: this rank's.
            owned: from `owned_runs`.
            optimizer: holds the state of the shards.
            buffers: gives the model's persistent buffers by logical name; they are equal on all ranks.
            device: one that the process group communicates from.
        """
        self._shards, self._owned, self._optimizer, self._device = shards, owned, optimizer, device
        self._buffers = buffers

    def _tensors(self, shard: Shard) -> dict[str, Tensor]:
        """What is saved of a shard, each laid out as its runs."""
        state = self._optimizer.state[shard.flat]
        return {WEIGHT: shard.flat.data} | {slot: state[slot] for slot in SLOTS if slot in state}

    def gather(self, steps: int) -> EngineState | None:
        """The image, on rank 0; None on the others. Collective."""
        tensors = [self._tensors(shard) for shard in self._shards]
        state = EngineState(steps)
        for slot in SLOTS:
            values = {index: of_shard[slot] for index, of_shard in enumerate(tensors) if slot in of_shard}
            for name, whole in (gather_parameters(values, self._owned, self._device) or {}).items():
                state.parameters.setdefault(name, {})[slot] = whole
        state.buffers = {name: buffer.detach().cpu().clone() for name, buffer in self._buffers().items()}
        return state if dist.get_rank() == 0 else None

    @torch.no_grad()
    def scatter(self, state: EngineState) -> None:
        """Takes this rank's part of an image. ValueError on all ranks alike, with nothing changed, if it misfits."""
        self._check(state)
        for shard in self._shards:
            for slot, flat in self._tensors(shard).items():
                for run in shard.runs:
                    load_run(flat, run, state.parameters[run.name][slot])
        for name, buffer in self._buffers().items():
            buffer.copy_(state.buffers[name])
        self._optimizer.set_step_count(state.steps)

    def _check(self, state: EngineState) -> None:
        """Looks at what any rank needs, so that no rank goes on alone."""
        slots = [list(self._tensors(shard)) for shard in self._shards]
        for rank in self._owned:
            for runs, needed in zip(rank, slots, strict=True):
                for run, slot in itertools.product(runs, needed):
                    _require(state.parameters.get(run.name, {}).get(slot), f"{slot} of {run.name}", run.shape)
        for name, buffer in self._buffers().items():
            _require(state.buffers.get(name), name, tuple(buffer.shape))


def _require(tensor: Tensor | None, what: str, shape: tuple[int, ...]) -> None:
    if tensor is None:
        raise ValueError(f"the saved state has no {what}: it is that of another model or optimizer")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"the saved {what} has shape {list(tensor.shape)}, this model's has {list(shape)}")
