"""Adam on records in their slots, in one pass over them: the Triton form of `kernels.rows.adam`.

A program has one row in registers. `read_rows` loads the record, makes up for the steps that the row missed and stores
the result beside the records; `update_rows` goes on from there, applies this step's gradient, and stores the record.

The bits are those of `kernels.rows.adam`, NaNs' payloads apart: the same IEEE operations in the same order, roots and
quotients correctly rounded, denormals kept, and fused multiply-adds where the reference has them and nowhere else
(`enable_fp_fusion=False` forbids the compiler to make more). Parts of records that are bfloat16 are unpacked to fp32
when they are loaded, and rounded where they are stored.

Shape suffixes: C slots, W words of a record, U rows of a step, D columns of a row, S numbers of state, T steps.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.rows import records_triton as placed
from kernels.rows.adam_gap_triton import settings
from kernels.rows.adam_kernels_triton import read_kernel, update_kernel
from kernels.rows.adam_rates import AdamRates
from kernels.rows.caught_up import CaughtUp
from kernels.rows.rounding_key import rounding_key


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
    weights_UD, state_US = got
    if state_US is None:
        placed.read_rows(records_CW, slots_U, weights_UD, bf16=bf16)
        return
    layout = _checked_layout(records_CW, slots_U, weights_UD, bf16, bf16_state)
    _check_got(got, slots_U, weights_UD)
    scalars_T2 = rates.scalars()
    if not weights_UD.numel():
        return
    with torch.cuda.device_of(records_CW):
        read_kernel[(len(slots_U),)](
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


def update_rows(
    records_CW: Tensor,
    slots_U: Tensor,
    rates: AdamRates,
    got: CaughtUp,
    grad_UD: Tensor,
    row_ids_U: Tensor | None = None,
    *,
    bf16: bool = False,
    bf16_state: bool = False,
    seed: int = 0,
    gradient_scale: float | Tensor = 1.0,
) -> None:
    """Applies the last of the applied steps to the rows, and sets their version to its number.

    Args:
        records_CW: float32, rows contiguous; a window or a whole shard.
        slots_U: int64, unique, on the device of the records.
        rates: of all applied steps, this one included.
        got: what `read_rows` wrote before this step, with no update since.
        grad_UD: float32, of any strides.
        row_ids_U: int64, job-wide; bf16 rows need them.
        bf16: whether the stored weights are bfloat16, which are rounded stochastically by (seed, row id, step).
        bf16_state: whether the stored moments are, likewise.
        seed: of the rounding.
        gradient_scale: multiplied with the gradient first: a number, or a float32 tensor of one element on the device,
            whose value nobody waits for.

    Raises:
        ValueError: tensors do not fit together, or bf16 rows come without ids.
    """
    layout = _checked_layout(records_CW, slots_U, grad_UD, bf16, bf16_state)
    _check_got(got, slots_U, grad_UD)
    row_ids_U = placed.rounding_ids(row_ids_U, slots_U, bf16 or bf16_state)
    scalars_T2, step = rates.scalars(), len(rates)
    if not grad_UD.numel():
        return
    weights_UD, state_US = got
    state = records_CW if state_US is None else state_US  # of the first nothing is read
    chosen = settings(rates)
    with torch.cuda.device_of(records_CW):
        update_kernel[(len(slots_U),)](
            records_CW,
            records_CW.stride(0),
            slots_U,
            slots_U.stride(0),
            grad_UD,
            *grad_UD.stride(),
            weights_UD,
            *weights_UD.stride(),
            state,
            state.stride(0),
            row_ids_U,
            row_ids_U.stride(0),
            scalars_T2,
            step,
            rounding_key(seed, step),
            rounding_key(seed, step, "state"),
            **{name: chosen[name] for name in ("lerp", "beta2", "eps", "FAR")},
            one_minus_beta2=1 - rates.betas[1],
            CAUGHT_UP=state_US is not None,
            **placed.scaling(gradient_scale),
            **layout,
            **_launch(layout["BLOCK"]),
        )


def _gap_arguments(rates: AdamRates) -> tuple[Tensor, Tensor, Tensor]:
    if rates.gaps is None:
        unread = rates.scalars()
        return unread, unread, unread
    return rates.gaps.sums(), rates.gaps.offsets_P, rates.gaps.decays()


def _checked_layout(
    records_CW: Tensor, slots_U: Tensor, rows_UD: Tensor, bf16: bool, bf16_state: bool
) -> dict[str, Any]:
    dim = rows_UD.shape[1]
    layout = placed.row_layout(dim, bf16) | {"STATE_WORDS": dim if bf16_state else 2 * dim}
    placed.check_rows(records_CW, slots_U, rows_UD, layout["WEIGHT_WORDS"] + layout["STATE_WORDS"] + 1)
    return layout


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
