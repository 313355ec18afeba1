"""The model under DeepSpeed, as a GPU and its host would feel it: launches on the host, work on the device.

What it computes is real, but not the model's: a loss of the very rows that it is given, so that their gradients, the
norm and the rows' updates are those of a training step, and must be the same bits wherever the rows live.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.gather import gather
from model.engram import MemoryRows
from tests.emulation.clock import Simulation
from tests.emulation.device import VirtualStreams
from tests.emulation.hardware import MODEL, OPTIMIZER, Hardware

_FORWARD = 1 / 3
"""Of a micro-batch's operations and launches: the backward has two products for each of the forward's."""
_LAUNCHES_A_SPAN = 50


@dataclass(frozen=True)
class Size:
    """What a step of the model comes to on one rank.

    Attributes:
        micro_batches: of a step.
        launches, flops: of a micro-batch.
        optimizer_bytes: that the backbone's optimizer moves.
        first_engram: the part of the forward before the first Engram layer.
    """

    micro_batches: int
    launches: int
    flops: float
    optimizer_bytes: float
    first_engram: float


class EmulatedEngine:
    """What `train.trainer.Trainer` needs of `train.engine.Engine`.

    Args:
        size: of the model's step.
        before_engram: called once a step, in the first forward, when the first Engram layer is launched.
        behind_engram: called once a step, in the last backward, when that of the first Engram layer is launched.
    """

    device = torch.device("cpu")

    def __init__(
        self,
        simulation: Simulation,
        streams: VirtualStreams,
        hardware: Hardware,
        size: Size,
        before_engram: Callable[[], None] = lambda: None,
        behind_engram: Callable[[], None] = lambda: None,
    ) -> None:
        self._simulation, self._streams, self._hardware, self._size = simulation, streams, hardware, size
        self._before_engram, self._behind_engram = before_engram, behind_engram
        self._done = 0
        self.module = nn.Module()
        self.optimizer_waits = False
        """Whether `step` leaves its work to `late_step`."""

    def __call__(
        self, tokens_BT: Tensor, positions_BT: Tensor, memory: Sequence[MemoryRows], labels_BT: Tensor
    ) -> Tensor:
        with self._simulation.uncharged():
            loss = sum(
                (((gather(*part) + 0.1 * (module + 1)) ** 2).sum() for module, part in enumerate(memory)),
                start=torch.zeros(()),
            )
        first = self._size.first_engram
        self._give(_FORWARD * first)
        if self._done == 0:
            self._before_engram()
        self._give(_FORWARD * (1 - first))
        return loss

    def backward(self, loss: Tensor) -> None:
        with self._simulation.uncharged():
            loss.backward()
        first = self._size.first_engram
        self._done += 1
        self._give((1 - _FORWARD) * (1 - first))
        if self._done == self._size.micro_batches:
            self._behind_engram()
        self._give((1 - _FORWARD) * first)

    def gradient_norm_squared(self) -> Tensor:
        launches = self._hardware.backbone.optimizer_launches
        seconds = self._size.optimizer_bytes / 8 / self._hardware.device.memory_bytes_per_second
        self._launch(OPTIMIZER, launches, seconds)
        event = self._streams.compute.record_event()
        event.synchronize()
        return torch.ones((), dtype=torch.float64)

    def step(self, **_: Any) -> None:
        self._done = 0
        if not self.optimizer_waits:
            self.late_step()

    def late_step(self) -> None:
        """The backbone's update."""
        seconds = self._size.optimizer_bytes / self._hardware.device.memory_bytes_per_second
        self._launch(OPTIMIZER, self._hardware.backbone.optimizer_launches, seconds)

    def _give(self, part: float) -> None:
        """A part of a micro-batch."""
        seconds = part * self._size.flops / self._hardware.device.flops_per_second
        self._launch(MODEL, part * self._size.launches, seconds)

    def _launch(self, what: str, launches: float, seconds: float) -> None:
        pieces = max(1, round(launches / _LAUNCHES_A_SPAN))
        self._simulation.charge()
        for _ in range(pieces):
            self._simulation.work(launches / pieces * self._hardware.host.launch_seconds, "launches")
            self._streams.compute.launch(what, seconds / pieces)
