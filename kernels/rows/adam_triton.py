"""Adam on records in their slots, in one pass over them: the Triton form of `kernels.rows.adam`.

A program holds one row in registers. `read_rows` loads the record, makes up for the steps that the row missed and
stores the result beside the records; `update_rows` goes on from there, applies this step's gradient, and stores the
record.

The bits are those of `kernels.rows.adam`, NaNs' payloads apart: the same IEEE operations in the same order, roots and
quotients correctly rounded, denormals kept, and fused multiply-adds where the reference has them and nowhere else
(`enable_fp_fusion=False` keeps the compiler from forming others). Parts of records that are bfloat16 are unpacked to
fp32 when they are loaded, and rounded where they are stored.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row, S numbers of state, T steps.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.rows import records_triton as placed
from kernels.rows.adam_gap_triton import settings
from kernels.rows.adam_kernels_triton import _read_kernel, _update_kernel
from kernels.rows.adam_rates import AdamRates
from kernels.rows.caught_up import CaughtUp
from kernels.rows.rounding_key import rounding_key
from kernels.rows.row_update import RowUpdate


def read_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    got: CaughtUp,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
) -> None:
    """Writes the rows with the effect of all applied steps. The slots are left as they are.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, on the device of the records.
        rates: of all applied steps.
        got: overwritten; without state for lazy Adam, which makes up for no missed steps.
        bf16: whether the stored weights are bfloat16.
        bf16_state: whether the stored moments are.

    Raises:
        ValueError: tensors do not fit together.
    """
    weights_UD, state_US, _ = got
    if state_US is None:
        placed.read_rows(records_CW, slots_U, weights_UD, bf16=bf16)
        return
    layout = _layout(weights_UD.shape[1], bf16, bf16_state)
    placed.check_rows(records_CW, slots_U, weights_UD, layout["WEIGHT_WORDS"] + layout["STATE_WORDS"] + 1)
    _check_got(got, slots_U, weights_UD)
    scalars_T2 = rates.scalars()
    if not weights_UD.numel():
        return
    with torch.cuda.device_of(records_CW):
        _read_kernel[(len(slots_U),)](
            records_CW,
            records_CW.stride(0),
            slots_U,
            slots_U.stride(0),
            weights_UD,
            *weights_UD.stride(),
            state_US,
            state_US.stride(0),
            scalars_T2,
            len(rates),
            *_gap_arguments(rates),
            **settings(rates),
            NODES=0 if rates.gaps is None else len(rates.gaps.offsets_P),
            **layout,
            **_launch(layout["BLOCK"]),
        )


def update_rows(update: RowUpdate, rates: AdamRates, got: CaughtUp) -> None:
    """Applies the last of the applied steps to the rows.

    Args:
        update: the rows and their gradients; its step is `len(rates)`.
        rates: of all applied steps, this one included.
        got: what `read_rows` wrote before this step, with no update since.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    layout = _layout(update.grad_UD.shape[1], update.bf16, update.bf16_state)
    arguments = placed.step_arguments(update, layout, layout["STATE_WORDS"])
    _check_got(got, update.slots_U, update.grad_UD)
    scalars_T2 = rates.scalars()
    if not update.grad_UD.numel():
        return
    weights_UD, state_US, _ = got
    state = update.records_CW if state_US is None else state_US  # the former is not read
    chosen = settings(rates)
    with torch.cuda.device_of(update.records_CW):
        _update_kernel[(len(update.slots_U),)](
            *arguments,
            rounding_key(update.seed, update.step, "state"),
            weights_UD,
            *weights_UD.stride(),
            state,
            state.stride(0),
            scalars_T2,
            **{name: chosen[name] for name in ("lerp", "beta2", "eps", "FAR")},
            one_minus_beta2=1 - rates.betas[1],
            CAUGHT_UP=state_US is not None,
            **layout,
            **_launch(layout["BLOCK"]),
        )


def _gap_arguments(rates: AdamRates) -> tuple[Tensor, Tensor, Tensor]:
    if rates.gaps is None:
        unread = rates.scalars()
        return unread, unread, unread
    return rates.gaps.sums(), rates.gaps.offsets_P, rates.gaps.decays()


def _layout(dim: int, bf16: bool, bf16_state: bool) -> dict[str, Any]:
    return placed.row_layout(dim, bf16) | {"STATE_WORDS": dim if bf16_state else 2 * dim}


def _check_got(got: CaughtUp, slots_U: Tensor, rows_UD: Tensor) -> None:
    dim = rows_UD.shape[1]
    for part, columns in ((got.weights_UD, dim), (got.state_US, 2 * dim)):
        if part is not None and (part.dtype != torch.float32 or part.shape != (len(slots_U), columns)):
            raise ValueError(
                f"what was read must be float32 [{len(slots_U)}, {columns}], not {part.dtype} {list(part.shape)}"
            )
    if got.state_US is not None and got.state_US.stride(1) != 1:
        raise ValueError(f"the state that was read must have contiguous rows, not strides {got.state_US.stride()}")


def _launch(block: int) -> dict[str, Any]:
    return {"num_warps": max(1, min(8, block // 256)), "num_stages": 1, "enable_fp_fusion": False}
