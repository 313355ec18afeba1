"""The backbone's optimizer: its config, and which parameter gets Muon and which gets Adam."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from model.parameters import ADAM_PATTERNS


class OptimizerConfig(
    BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True, allow_inf_nan=False
):
    """Optimizer of the backbone (the tables have their own: `offload`)."""

    name: Literal["muon", "adamw"] = "muon"
    """`muon`: Muon for matrices, AdamW for the rest. `adamw`: AdamW for everything."""
    learning_rate: float = Field(4e-4, gt=0)
    """Peak learning rate."""
    muon_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the Muon parameters; null: the same. One value serves both, see `muon_update_rms`."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of parameters with two or more dimensions; vectors are not decayed."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam: decay of the first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam: decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam: added to the root of the second moment."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Muon: decay of the momentum (Nesterov)."""
    newton_schulz_steps: int = Field(5, ge=1, le=20)
    """Muon: iterations of the orthogonalisation."""
    newton_schulz_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Muon: number format of the orthogonalisation; auto: bf16 on a GPU, fp32 on a CPU."""
    muon_update_rms: float = Field(0.2, gt=0)
    """Muon: root mean square of an update, in learning rates. Adam's is 0.2 to 0.4, hence one learning rate for both
    (Liu et al. 2025, "Muon is scalable for LLM training")."""
    adam_parameters: list[str] = Field(default=list(ADAM_PATTERNS))
    """Shell patterns of the names of matrices that use Adam even with `muon`: embeddings, head, router, norms,
    convolutions, mappings of hyper-connections."""


class GroupKey(NamedTuple):
    """What makes two parameters share an optimizer group."""

    muon: bool
    decay: bool


def assign(config: OptimizerConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, GroupKey]:
    """Decides for every parameter, by name and shape, whether Muon updates it and whether its weights decay.

    Muon takes whatever acts as a matrix: two-dimensional weights, and stacks of them (experts), each matrix on its own.
    """
    return {name: _group_key(config, name, shape) for name, shape in shapes.items()}


def _group_key(config: OptimizerConfig, name: str, shape: tuple[int, ...]) -> GroupKey:
    is_matrix = len(shape) >= 2 and min(shape[-2:]) > 1
    excluded = any(fnmatchcase(name, pattern) for pattern in config.adam_parameters)
    return GroupKey(muon=config.name == "muon" and is_matrix and not excluded, decay=len(shape) >= 2)
