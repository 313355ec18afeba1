"""Sends plans to the device ahead of their steps, without making anybody wait; those made there stay where they are.

A step's plan is as large as its token ids many times over: copied when the step begins, it would hold the model up.
"""

from dataclasses import replace

import torch
from torch import Tensor

from offload.device.sender import Sender, Sent
from offload.plan.plan import Plan

_NO_STEP = -1


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
        return replace(plan.map(self._sender.pinned), rows_O=self._sender.pinned(plan.rows_O))

    def now(self, plan: Plan) -> Plan:
        """Sends and takes a pinned plan that is no training step's."""
        self.send(_NO_STEP, plan)
        return self.take(_NO_STEP, plan)

    def send(self, step: int, plan: Plan) -> None:
        """Starts to send a step's pinned plan."""
        tensors: list[Tensor] = []
        plan.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
        self._sent[step] = self._sender.send(*tensors)

    def take(self, step: int, plan: Plan) -> Plan:
        """The plan that was sent, with its modules' tensors on the device, for the caller's stream."""
        there = iter(self._sent.pop(step).take())
        return plan.map(lambda _: next(there))
