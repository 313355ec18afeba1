"""Sends plans to the device ahead of their steps, without making anybody wait; those made there stay where they are.

A step's plan is many times as large as its token ids: copied when the step begins, it would hold up the model. And it
has some eight tensors for each micro-batch, thousands where there are hundreds of these: they go as one.
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
        packed = self._sender.packed(plan.tensors)
        if packed is not None:
            plan = replace(_unpacked(plan, packed), packed=packed)
        return replace(plan, rows_O=self._sender.pinned(plan.rows_O))

    def now(self, plan: Plan) -> Plan:
        """Sends and takes a pinned plan that belongs to no training step."""
        self.send(_NO_STEP, plan)
        return self.take(_NO_STEP, plan)

    def send(self, step: int, plan: Plan) -> None:
        """Starts to send a step's pinned plan."""
        self._sent[step] = self._sender.send(*(plan.tensors if plan.packed is None else [plan.packed]))

    def take(self, step: int, plan: Plan) -> Plan:
        """The plan that was sent, with its modules' tensors on the device, for the caller's stream."""
        there = self._sent.pop(step).take()
        if plan.packed is not None:
            return _unpacked(plan, *there)
        tensors = iter(there)
        return plan.map(lambda _: next(tensors))


def _unpacked(plan: Plan, packed: Tensor) -> Plan:
    """The plan with its modules' tensors from where they lie one after another."""
    parts = iter(packed.split([tensor.numel() for tensor in plan.tensors]))
    return plan.map(lambda _: next(parts))
