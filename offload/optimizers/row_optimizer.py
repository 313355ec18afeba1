"""What a row optimizer declares: its state, what steps without a gradient do to a row, and its kernels.

Kernels are imported by the methods that need them: the config reads the list of optimizers and must not wait for
torch.

Shape suffixes: B rows of a block, U rows of a step, C slots, W words of a record, D columns of a row, S numbers of
state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from kernels.rows.caught_up import CaughtUp
    from kernels.rows.rate_history import RateHistory


StateDtype = Literal["fp32", "bf16"]


class Settings(Protocol):
    """What optimizers read from `offload.config.TableOptimizerConfig`, whose docstrings say what it means."""

    @property
    def untouched_rows(self) -> Literal["exact", "closed", "lazy"]:
        """Whether steps without a gradient are made up for, and how."""

    @property
    def state_dtype(self) -> StateDtype:
        """The dtype in which the state is kept between updates."""

    @property
    def beta1(self) -> float:
        """Decay of a first moment."""

    @property
    def beta2(self) -> float:
        """Decay of a second moment."""

    @property
    def eps(self) -> float:
        """Added to the denominator."""


@dataclass(frozen=True)
class StoredRows:
    """What kernels must know about the rows in their slots.

    Attributes:
        bf16: whether the stored weights are bfloat16, which are rounded stochastically.
        seed: of the rounding.
        device: of the records.
    """

    bf16: bool
    seed: int
    device: torch.device


class RowKernels(Protocol):
    """Kernels that read and update rows in their slots, with the bits of `RowOptimizer.step` and `replay`.

    They see the learning rates of all applied steps. On a GPU they neither wait for it nor allocate from step to step.
    """

    def read(self, records_CW: Tensor, slots_U: Tensor, got: CaughtUp) -> Tensor | None:
        """Writes rows with the effect of all applied steps. The slots are left as they are.

        Returns:
            None if all rows were written; else where each one's weights are (int64 [U]): its slot, if it missed no
            step, or -1 - u if they are `got.weights_UD[u]`.
        """

    def update(
        self,
        records_CW: Tensor,
        slots_U: Tensor,
        got: CaughtUp,
        grad_UD: Tensor,
        row_ids_U: Tensor | None,
        gradient_scale: float,
    ) -> None:
        """Applies the last of the applied steps to the rows, and sets their version to its number.

        Args:
            records_CW, slots_U: as they were read, with no update since; the slots (int64) are unique.
            got: what the read wrote.
            grad_UD: fp32.
            row_ids_U: int64, job-wide; bf16 rows need them.
            gradient_scale: the gradient is first multiplied by it.
        """


class RowOptimizer(ABC):
    """A row optimizer under its settings."""

    name: ClassVar[str]
    """Its name in `offload.optimizer.type`."""
    title: ClassVar[str]
    """Its name in tables of measurements."""
    keeps: ClassVar[str]
    """The state that it keeps, as the config's description says it."""
    moves_resting_rows: ClassVar[bool] = False
    """Whether a step without a gradient moves a row's weights."""
    state_dtypes: ClassVar[tuple[StateDtype, ...]] = ("fp32",)
    """The dtypes in which its state can be kept."""

    def __init__(self, settings: Settings) -> None:
        """`settings` are some that `check` lets pass."""
        self.settings = settings
        self.makes_up = settings.untouched_rows != "lazy"

    @classmethod
    def check(cls, settings: Settings) -> None:
        """Raises ValueError, with one line that names the keys, for settings that this optimizer does not take."""
        if settings.state_dtype not in cls.state_dtypes:
            raise ValueError(f"type={cls.name} keeps its state in fp32 only: set state_dtype to fp32")

    @staticmethod
    @abstractmethod
    def state_size(dim: int) -> int:
        """Numbers of state of a row with `dim` columns (S)."""

    @property
    def replays(self) -> bool:
        """Whether the steps that a row missed are applied, one by one or at once, when it is next used."""
        return self.makes_up and self.moves_resting_rows

    @property
    def state_decay(self) -> float | None:
        """The factor of each missed step on a row's one number of state; None where it leaves the state alone."""
        return None

    @abstractmethod
    def step(
        self, weights_BD: Tensor, state_BS: Tensor, grad_BD: Tensor, scratch_BD: Tensor, *, step: int, lr: float
    ) -> None:
        """One step in plain PyTorch, in place: what all kernels are compared with.

        A row's result must have the same bits whatever the other rows.

        Args:
            weights_BD, state_BS: fp32, views of records.
            grad_BD: fp32.
            scratch_BD: fp32, overwritten.
            step: number of this step among the applied ones, from 1.
            lr: the rows' own learning rate.
        """

    def replay(
        self,
        weights_BD: Tensor,
        state_BS: Tensor,
        last_steps: Sequence[int],
        rates: RateHistory,
        scratch_4BD: Tensor,
    ) -> None:
        """Applies the steps without a gradient that rows missed, in place, in plain PyTorch. Only if it `replays`.

        Args:
            weights_BD, state_BS: fp32, views of records.
            last_steps: B integers, ascending: the applied step that each row is at.
            rates: the rows' own, of all applied steps.
            scratch_4BD: fp32 [4, B, D], overwritten.
        """
        raise NotImplementedError(f"{self.name} has no steps to replay")

    @abstractmethod
    def triton(self, rates: RateHistory, rows: StoredRows) -> RowKernels:
        """The kernels for a GPU."""

    @abstractmethod
    def compiled(self, rates: RateHistory, rows: StoredRows) -> RowKernels:
        """The kernels that Numba compiles for a CPU."""
