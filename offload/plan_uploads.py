"""Sends plans to the device ahead of their steps, without making anybody wait.

A step's plan is as large as its token ids many times over: copied when the step begins, it would hold the model up.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kernels.gather import RowIndex
from offload.plan import ModulePlan, Plan
from offload.streams import Event, streams_of


class PlanUploads:
    """The plans' tensors that the device needs, on a stream of their own.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._streams = device, streams_of(device)
        self._stream = self._streams.new()
        self._sent: dict[int, tuple[tuple[ModulePlan, ...], Event]] = {}

    def pin(self, plan: Plan) -> Plan:
        """The plan in memory that can be sent asynchronously. The device must be the calling thread's."""
        if self._device.type == "cpu":
            return plan
        return replace(plan, modules=tuple(_each(part, _pinned) for part in plan.modules))

    def send(self, step: int, plan: Plan) -> None:
        """Starts to send a pinned plan, once."""
        if step in self._sent or self._device.type == "cpu":
            return
        with self._streams.use(self._stream):
            there = tuple(_each(part, self._to_device) for part in plan.modules)
        self._sent[step] = there, self._stream.record_event()

    def take(self, step: int, plan: Plan) -> Plan:
        """The plan with its modules' tensors on the device, for the caller's stream."""
        if self._device.type == "cpu":
            return plan
        self.send(step, plan)
        modules, landed = self._sent.pop(step)
        self._streams.current().wait_event(landed)
        return replace(plan, modules=tuple(_each(part, self._lent) for part in modules))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _lent(self, tensor: Tensor) -> Tensor:
        # Made on this object's stream: its memory must not be given away while the caller's stream still reads it.
        tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensor


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory()


def _each(part: ModulePlan, change: Callable[[Tensor], Tensor]) -> ModulePlan:
    indices = tuple(RowIndex(*map(change, index)) for index in part.indices)
    return replace(part, indices=indices, owed_places_A=change(part.owed_places_A))
