"""Values from the owners to the ranks that use them, and gradients back: one all-to-all each way.

Shape suffixes as in `offload.plan.plan`; D columns of a row.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.gather.parts import sum_parts
from kernels.gather.values import RowValues
from offload.plan.plan import ModulePlan


def exchange_values(
    plan: ModulePlan, owned: RowValues, group: dist.ProcessGroup | None, dtype: torch.dtype = torch.float32
) -> RowValues:
    """Sends this rank's rows to the ranks that requested them; returns those it requested itself. Collective.

    Args:
        plan: the step's, its tensors on the device of the rows.
        owned: what this rank owns, O rows. If they are in their slots, they are copied once, into what is sent.
        group: the ranks.
        dtype: in which values travel, rounded to nearest. A single rank rounds them too, so that the values do not
            depend on the number of ranks.

    Returns:
        U rows in a tensor of their own; for a single rank the given ones themselves, if no rounding is asked for.
    """
    if len(plan.owed) == 1:
        return owned if dtype == torch.float32 else RowValues(owned.tensor().to(dtype).to(torch.float32))
    sent_AD = owned.only(plan.owed_indices_A).tensor().to(dtype)
    return RowValues(_all_to_all(sent_AD, plan.owed, plan.asked, group)().to(torch.float32))


def exchange_gradients(plan: ModulePlan, gradient_UD: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Starts sending gradients to the rows' owners, beside whatever the caller's stream is given next. Collective.

    A rank names each row once, and a row's parts are added to zero one by one: the result has the same bits whatever
    arrives first. On a GPU the sum is one launch, however many ranks there are; a single rank's is the given memory.

    Returns:
        A function that waits for them and returns the sum [O, D] over the ranks, added in rank order; for the caller's
            stream.
    """
    if len(plan.owed) == 1:
        return lambda: gradient_UD
    arriving = _all_to_all(gradient_UD, plan.asked, plan.owed, group)
    return lambda: sum_parts(arriving(), plan.owed_order_A, plan.owed_starts_O)


def _all_to_all(
    sent: Tensor, sizes_out: list[int], sizes_in: list[int], group: dist.ProcessGroup | None
) -> Callable[[], Tensor]:
    sent, received = sent.contiguous(), sent.new_empty(sum(sizes_in), sent.shape[1])
    work = dist.all_to_all_single(received, sent, sizes_in, sizes_out, group=group, async_op=True)

    def arrived() -> Tensor:
        assert work is not None  # this rank is one of the group
        work.wait()
        return received

    return arrived
