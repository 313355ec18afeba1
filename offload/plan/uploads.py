"""Sends plans to the device ahead of their steps, without making anybody wait.

A step's plan is as large as its token ids many times over: copied when the step begins, it would hold the model up.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from offload.device.sender import Sender, Sent
from offload.plan.plan import ModulePlan, Plan


class PlanUploads:
    """The plans' tensors that the device needs.

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._sender = Sender(device)
        self._sent: dict[int, Sent] = {}

    def pin(self, plan: Plan) -> Plan:
        """The plan in memory that can be sent asynchronously; for the planner's thread."""
        pinned = _changed(plan, self._sender.pinned)
        return replace(pinned, rows_O=self._sender.pinned(plan.rows_O))

    def send(self, step: int, plan: Plan) -> None:
        """Starts to send a step's pinned plan."""
        tensors: list[Tensor] = []
        _changed(plan, lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        self._sent[step] = self._sender.send(*tensors)

    def take(self, step: int, plan: Plan) -> Plan:
        """The plan that was sent, with its modules' tensors on the device, for the caller's stream."""
        there = iter(self._sent.pop(step).take())
        return _changed(plan, lambda _: next(there))


def _changed(plan: Plan, change: Callable[[Tensor], Tensor]) -> Plan:
    """The plan with every tensor that the device needs replaced, in an order that is always the same."""
    return replace(plan, modules=tuple(_changed_module(part, change) for part in plan.modules))


def _changed_module(part: ModulePlan, change: Callable[[Tensor], Tensor]) -> ModulePlan:
    indices = tuple(index.map(change) for index in part.indices)
    places_A, order_A, starts_O = map(change, (part.owed_places_A, part.owed_order_A, part.owed_starts_O))
    return replace(part, indices=indices, owed_places_A=places_A, owed_order_A=order_A, owed_starts_O=starts_O)
