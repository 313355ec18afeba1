"""The gradients of a step's rows: summed micro-batch by micro-batch, and sent to the rows' owners with the last.

A micro-batch reads a few of the step's rows, and its gradient has these rows alone. A dense one of all rows, as
autograd makes and adds it, would take as much memory again as they do, and time for all of them in each of many
micro-batches.

Shape suffixes: U rows of the step that this rank requested, V of them that a micro-batch reads, O rows that this rank
owns, D columns of a row.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather import RowIndex
from kernels.gather.add_rows import add_rows
from kernels.gather.values import RowValues
from offload.plan.exchange import exchange_gradients
from offload.plan.plan import ModulePlan


class ModuleGradient:
    """The gradient of one module's rows, over one step.

    A row's gradient is the sum, from zero, of those of the micro-batches that read it, in the order in which their
    backwards reach it.

    Args:
        plan: the module's, its tensors on the device.
        values: the rows.
        group: the ranks.
    """

    def __init__(self, plan: ModulePlan, values: RowValues, group: dist.ProcessGroup | None) -> None:
        self._plan, self._values, self._group = plan, values, group
        self._missing = len(plan.indices)
        self._total_UD: Tensor | None = None
        self._arriving: Callable[[], Tensor] | None = None

    def leaf(self, micro_batch: int) -> tuple[Tensor, RowIndex]:
        """The rows that a micro-batch reads, as an autograd leaf [V, D], and which of them every lookup reads.

        Rows that are looked up where they are stored have a leaf without values, all NaN, for their gradient alone. The
        backward must go through it exactly once.
        """
        index = self._plan.indices[micro_batch]
        rows_V = None if len(index.rows_V) == index.num_rows else index.rows_V
        values = self._values if rows_V is None else self._values.only(rows_V)
        index = index.compact
        if values.places_U is None:
            values_VD = values.table_CW.detach()
        else:
            values_VD = torch.full((), torch.nan).expand(len(values.places_U), values.dim)
            index = index._replace(stored=values)
        values_VD.requires_grad_().register_post_accumulate_grad_hook(partial(self._add, rows_V))
        return values_VD, index

    @property
    def total(self) -> Tensor:
        """fp32 [U, D]: the sum so far."""
        if self._total_UD is None:
            self._total_UD = self._values.zeros()
        return self._total_UD

    def sum(self) -> Tensor:
        """The sum [O, D] over the ranks, of the rows that this one owns; sends what was not sent yet. Collective."""
        self._send()
        assert self._arriving is not None
        return self._arriving()

    def _add(self, rows_V: Tensor | None, leaf_VD: Tensor) -> None:
        gradient_VD, leaf_VD.grad = leaf_VD.grad, None
        assert gradient_VD is not None
        if self._arriving is not None:
            raise RuntimeError("a gradient of rows came after those of all micro-batches were sent to the rows' owners")
        if rows_V is not None:
            add_rows(self.total, rows_V, gradient_VD)
        elif self._total_UD is None:
            self._total_UD = gradient_VD
        else:
            self._total_UD += gradient_VD
        self._missing -= 1
        if not self._missing:
            self._send()

    def _send(self) -> None:
        if self._arriving is None:
            self._arriving = exchange_gradients(self._plan, self.total, self._group)
